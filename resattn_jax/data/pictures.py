"""Pictures: the content of a JPEG, PNG, WebP or other image file, and the pixels in it.

libjpeg-turbo (through simplejpeg) decodes the usual JPEG. Pillow decodes the rest, and every JPEG that libjpeg-turbo
warns of.
"""

from __future__ import annotations

import io
import re
import threading
import warnings

import numpy as np
import PIL.features
import PIL.Image
import simplejpeg

from resattn_jax.errors import reason

MAX_PIXELS = PIL.Image.MAX_IMAGE_PIXELS or 89_478_485  # a file that claims more is taken for a decompression bomb

# Kinds by their content, and the endings of their files' names. Pillow would start programs for some other kinds.
_AVIF = PIL.features.check("avif")  # not in every build of Pillow
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if _AVIF else []))
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *([".avif"] if _AVIF else [])),
)

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the chunks that make the pixels

_ORIENTATION = 0x0112  # EXIF's tag, and what undoes each of its values
_TURNS = dict(
    enumerate(
        (
            PIL.Image.Transpose.FLIP_LEFT_RIGHT,
            PIL.Image.Transpose.ROTATE_180,
            PIL.Image.Transpose.FLIP_TOP_BOTTOM,
            PIL.Image.Transpose.TRANSPOSE,
            PIL.Image.Transpose.ROTATE_270,
            PIL.Image.Transpose.TRANSVERSE,
            PIL.Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)

# What libjpeg says of a file in which data ends before the picture does.
_MISSING = re.compile("premature end of data segment|found marker 0xd9 instead of RST")
# What libjpeg says of data between the last row and the end of the file: the number of bytes.
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0xd9$")

# Pillow warns of large sizes, which are checked here, and of odd metadata. `catch_warnings` would not do: it is for one
# thread at a time.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenPicture(Exception):
    """The file is no picture, or not a whole one, or one that is too large. The message is the reason."""


class Scratch(threading.local):
    """Memory that each thread keeps for pixels: asking the kernel for it takes as long as a resize."""

    _LARGEST = 16 << 20

    def __init__(self) -> None:
        self._memory = np.empty(1 << 20, np.uint8)

    def room(self, size: int) -> np.ndarray | None:
        """uint8 [size or more], or None if the size is too large to be kept."""
        if size > self._LARGEST:
            return None
        if size > len(self._memory):
            self._memory = np.empty(size, np.uint8)
        return self._memory


class Picture:
    """A picture whose header has been read. height and width are in pixels."""

    def __init__(self, data: bytes, *, upright: bool = False):
        """upright: turned and mirrored as its EXIF orientation asks for; else as it is stored. Raises BrokenPicture."""
        self._data, self._inks = data, False
        self._image: PIL.Image.Image | None = None
        if not data:
            raise BrokenPicture("the file is empty")
        if not data.startswith(_JPEG):
            self._open()
        else:
            try:
                self.height, self.width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
                self._inks = colorspace in ("CMYK", "YCCK")
            except ValueError:  # Pillow may read it nevertheless
                self._open()
            if self._inks:
                self._open()
        if self.height * self.width > MAX_PIXELS:
            raise BrokenPicture(f"it claims to have {self.height} x {self.width} pixels, more than {MAX_PIXELS:,}")
        if upright and (orientation := exif_orientation(data)) != 1:
            self._turn(_TURNS[orientation])

    def pixels(self, shrink: int = 1, channels: int = 3) -> np.ndarray:
        """Pixels, uint8 [ceil(height / shrink), ceil(width / shrink), channels]. shrink is 1, 2, 4 or 8.

        channels is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGBA. What is transparent lies on white paper
        where no alpha is asked for. The decoder itself shrinks a JPEG. Raises BrokenPicture.
        """
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        if self._image is None and channels in (1, 3):
            try:
                space = "RGB" if channels == 3 else "GRAY"
                return simplejpeg.decode_jpeg(self._data, space, min_height=height, min_width=width)
            except ValueError as error:  # a warning is a ValueError too; Pillow decides whether it is one
                _check_complete(error)
                self._open()
        if self._inks:
            self._check_inks()
        try:
            image = PIL.Image.fromarray(self.pixels()) if self._image is None else self._image
            image = to_mode(image, channels)
            content = (image if shrink == 1 else image.reduce(shrink)).tobytes()  # quicker than np.asarray
        except BrokenPicture:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise BrokenPicture(reason(error)) from error
        return np.frombuffer(content, np.uint8).reshape(height, width, channels)

    def top_pixels(self, rows: int, shrink: int, scratch: Scratch) -> np.ndarray:
        """RGB pixels for training: quicker than `pixels`, less exact, and only the first `rows` of the picture or more.

        They stay in `scratch` until this thread asks for other pixels. Raises BrokenPicture.
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
            left_over = _LEFT_OVER.search(str(error))
            if rows == self.height or not left_over:
                return self.pixels(shrink)
            if self._seems_incomplete(rows, int(left_over[1])):
                self.pixels(8)  # raises BrokenPicture if it is
        return memory[: height * width * 3].reshape(height, width, 3)

    def _seems_incomplete(self, rows: int, left_over: int) -> bool:
        """Whether the rows below the first `rows` have less than a quarter of their bytes a row."""
        used = len(self._data) - left_over - max(self._data.find(b"\xff\xda"), 0)  # the header ends about there
        return 4 * left_over * rows < used * (self.height - rows)

    def _check_inks(self) -> None:
        """Raises BrokenPicture if a CMYK JPEG is incomplete, of which Pillow says nothing."""
        try:
            simplejpeg.decode_jpeg(self._data, "CMYK", min_height=1, min_width=1)
        except ValueError as error:
            _check_complete(error)

    def _turn(self, method: PIL.Image.Transpose) -> None:
        image = PIL.Image.fromarray(self.pixels()) if self._image is None else self._image
        self._image = image.transpose(method)
        self.width, self.height = self._image.size

    def _open(self) -> None:
        data, kinds = (_bare_png(self._data), ("PNG",)) if self._data.startswith(_PNG) else (self._data, _KINDS)
        try:
            self._image = PIL.Image.open(io.BytesIO(data), formats=kinds)
        except PIL.UnidentifiedImageError:
            raise BrokenPicture("it is no image of a known kind") from None
        except Exception as error:
            raise BrokenPicture(reason(error)) from error
        self.width, self.height = self._image.size


def exif_orientation(data: bytes) -> int:
    """How the pixels of a file have to be turned to be looked at: 2 to 8 as in EXIF's tag 0x0112, 1 for not at all."""
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_KINDS) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of many kinds: what cannot be read says nothing
        return 1
    return found if found in _TURNS else 1


def to_mode(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """Grey, palette, CMYK and 16-bit images with 1, 2, 3 or 4 channels of 8 bits, as `Picture.pixels` has them."""
    mode = _MODES[channels]
    if image.mode == mode and (mode != "RGB" or "transparency" not in image.info):
        return image
    if image.mode == "F":
        raise BrokenPicture("its pixels are floating-point numbers")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip them at 255
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if channels in (1, 3) and ("A" in image.mode.upper() or "transparency" in image.info):
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(paper, image)
    return image.convert(mode)


def _check_complete(error: ValueError) -> None:
    """Raises BrokenPicture if libjpeg's warning is of missing data, for which it puts grey."""
    if _MISSING.search(str(error)):
        raise BrokenPicture(f"it holds less than its header claims ({error})") from error


def _bare_png(data: bytes) -> bytes:
    """A PNG without its texts and colour profile: Pillow refuses those of more than a megabyte."""
    place, dropped = len(_PNG), []
    while place < len(data):  # chunks: a length, a kind, so many bytes, a checksum
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in _PNG_PIXELS:
            dropped.append((place, end))
        place = end
    if not dropped:
        return data
    starts, ends = [0, *(end for _, end in dropped)], [*(start for start, _ in dropped), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _cut_off(data: bytes, rows: int) -> bytes | None:
    """A sequential JPEG whose header claims so many rows, so that the decoder stops there. None for other kinds.

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
