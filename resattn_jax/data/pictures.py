"""Pictures: the bytes of a JPEG, PNG, WebP or other image file, and the RGB pixels in them.

libjpeg-turbo (through simplejpeg) decodes the usual JPEG; Pillow the rest, and every JPEG the former finds fault with.
"""

from __future__ import annotations

import io
import re
import threading
import warnings

import numpy as np
import PIL.Image
import simplejpeg

from resattn_jax.errors import reason

MAX_PIXELS = PIL.Image.MAX_IMAGE_PIXELS  # 89 million; what claims to be larger is taken for a decompression bomb
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the name says; Pillow would start programs for others

# Of sizes, which are checked here, and of odd metadata. Not in `catch_warnings`, which is for one thread at a time.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenPicture(Exception):
    """The bytes are no picture, or not all of one, or of one too large; the message is the reason."""


class Scratch(threading.local):
    """Memory that each thread keeps for the pixels it works on: asking the kernel for it takes as long as a resize."""

    _LARGEST = 16 << 20

    def __init__(self):
        self._memory = np.empty(1 << 20, np.uint8)

    def room(self, size: int) -> np.ndarray | None:
        """uint8 of at least `size`, or None for more than is worth keeping."""
        if size > self._LARGEST:
            return None
        if size > len(self._memory):
            self._memory = np.empty(size, np.uint8)
        return self._memory


class Picture:
    """A picture whose header has been read. height and width are in pixels.

    EXIF orientation is not applied, as it was not when the published nets were trained.
    """

    def __init__(self, data: bytes):
        """Raises BrokenPicture."""
        self._data, self._image = data, None
        if not data:
            raise BrokenPicture("the file is empty")
        try:
            self.height, self.width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in ("CMYK", "YCCK"):
                self._open()
        except ValueError:  # no JPEG, or one that only Pillow can make something of
            self._open()
        if self.height * self.width > MAX_PIXELS:
            raise BrokenPicture(f"it claims to have {self.height} x {self.width} pixels, more than {MAX_PIXELS:,}")

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """RGB pixels, uint8 [ceil(height / shrink), ceil(width / shrink), 3]; shrink is 1, 2, 4 or 8.

        The decoder itself does the shrinking of a JPEG. Raises BrokenPicture.
        """
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        if self._image is None:
            try:
                return simplejpeg.decode_jpeg(self._data, min_height=height, min_width=width)
            except ValueError:  # also raised for what only warrants a warning; Pillow tells one from the other
                self._open()
        try:
            image = to_rgb(self._image)
        except Exception as error:  # Pillow's decoders raise many kinds
            raise BrokenPicture(reason(error)) from error
        return np.asarray(image if shrink == 1 else image.reduce(shrink))

    def top_pixels(self, rows: int, shrink: int, scratch: Scratch) -> np.ndarray:
        """As `pixels`, for training: quicker, less exact, and only the first `rows` of the picture or more.

        The pixels stand in `scratch` until this thread asks for others.
        """
        rows = min(-(-rows // 16) * 16, self.height)
        height, width = -(-rows // shrink), -(-self.width // shrink)
        memory = None if self._image else scratch.room(height * width * 3)
        if memory is None:
            return self.pixels(shrink)
        data = self._data if rows == self.height else _cut_off(self._data, rows)
        if data is None:
            return self.pixels(shrink)
        try:
            simplejpeg.decode_jpeg(data, fastdct=True, min_height=height, min_width=width, buffer=memory)
        except ValueError as error:
            if rows == self.height or not re.search(_LEFT_OVER, str(error)):
                return self.pixels(shrink)
        return memory[: height * width * 3].reshape(height, width, 3)

    def _open(self) -> None:
        try:
            self._image = PIL.Image.open(io.BytesIO(self._data), formats=_KINDS)
        except PIL.UnidentifiedImageError:
            raise BrokenPicture("it is no image of a known kind") from None
        except Exception as error:
            raise BrokenPicture(reason(error)) from error
        self.width, self.height = self._image.size


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey, palette, CMYK and 16-bit images as RGB; what is transparent as if it lay on white paper."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip them at 255
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode.upper() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(paper, image)
    return image.convert("RGB")


_LEFT_OVER = "extraneous bytes before marker 0xd9$"  # libjpeg's warning of data after the last row, once all is done


def _cut_off(data: bytes, rows: int) -> bytes | None:
    """A sequential JPEG whose header claims so many rows, so that the decoder stops there; None for another kind.

    The format: ITU-T T.81, B.2: segments of a marker and a length, of which SOF0 or SOF1 holds the height.
    """
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (0xC0, 0xC1):
            return b"".join((data[: place + 5], rows.to_bytes(2, "big"), data[place + 7 :]))
        if marker in (0xC2, 0xDA):  # progressive: every pass goes over the whole picture
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
