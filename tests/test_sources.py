"""Sources other than the small sets of test_data and the folders of test_folder, and pictures of every kind."""

import io
import pickle

import numpy as np
import PIL.features
import PIL.Image
import PIL.PngImagePlugin
import pytest
from helpers import ROOT, broken_files, encoded, flat, jpeg_claiming, photograph, save

from resattn_jax.data.pictures import BrokenPicture, Picture, Scratch
from resattn_jax.data.sources import open_source


def test_digits_keep_the_slices_that_old_runs_trained_on():
    rows = np.random.default_rng(0).permutation(1437)[:1293]
    part = open_source("digits", "train[:90%]")
    assert part.name(0) == f"digits example {rows[0]}"
    assert len(part) == 1293


def test_tfds_sets_of_any_size_and_their_slices(tfds_dir):
    train = open_source("imagenet2012", "train", tfds_dir)
    assert (len(train), len(train.class_names), train.image_shape) == (300, 1000, None)
    assert len(open_source("imagenet2012", "train[:90%]", tfds_dir)) == 270
    data, label = train[7]
    assert PIL.Image.open(io.BytesIO(data)).format == "JPEG"
    wordnet_id = train.class_names[label]
    assert wordnet_id in train.name(7)  # its file name begins with the class's: n01440764_1234.JPEG


@pytest.mark.parametrize("name", ["folder", "synthetic", "digits", "imagenet2012"])
def test_a_source_can_be_sent_to_another_process(name, tmp_path, request):
    data_dir = request.getfixturevalue("tfds_dir") if name == "imagenet2012" else None
    for path in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        save(tmp_path / "train" / path, "red")
    source = open_source(f"folder:{tmp_path}" if name == "folder" else name, "train", data_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3]
    assert copy.class_names == source.class_names


def test_the_synthetic_source_has_photographs_sizes():
    source = open_source("synthetic", "train")
    sizes = [Picture(source[row][0]) for row in range(64)]
    pixels = np.array([p.height * p.width for p in sizes])
    assert 120_000 < np.median(pixels) < 240_000  # ImageNet: 500 x 375
    lengths = [len(source[row][0]) for row in range(64)]
    assert 60_000 < np.mean(lengths) < 180_000  # ImageNet: 110 kB


def test_a_kind_of_source_is_imported_when_it_is_asked_for_and_none_imports_jax():
    import subprocess
    import sys

    kinds = "digits", "folder", "slices", "synthetic", "tfds"
    program = f"""
import importlib, sys
import resattn_jax.data.sources as sources
early = [kind for kind in {kinds} if f"resattn_jax.data.sources.{{kind}}" in sys.modules]
assert not early, early
for kind in {kinds}:
    importlib.import_module(f"resattn_jax.data.sources.{{kind}}")
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# ---- Pictures of every kind.


def palette(**info):
    image = PIL.Image.new("P", (16, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(flat("L", 90)), (90, 90, 90)),
        (encoded(flat("L", 90), "JPEG"), (90, 90, 90)),
        (encoded(flat("1", 1)), (255, 255, 255)),
        (encoded(flat("RGB", (200, 100, 50))), (200, 100, 50)),
        (encoded(flat("RGB", (200, 100, 50)), "JPEG", quality=95), (200, 100, 50)),
        (encoded(flat("RGB", (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50)),
        (encoded(palette()), (200, 100, 50)),
        (encoded(palette(), transparency=1), (255, 255, 255)),
        (encoded(flat("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (encoded(flat("RGBA", (200, 100, 50, 0))), (255, 255, 255)),  # transparent, on white paper
        (encoded(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
        (encoded(flat("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (encoded(flat("LA", (90, 255))), (90, 90, 90)),
        (encoded(flat("LA", (90, 0))), (255, 255, 255)),
        (encoded(flat("I;16", 90 * 257)), (90, 90, 90)),  # 16 bits a pixel
        (encoded(flat("I;16", 65535)), (255, 255, 255)),
        (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        (encoded(flat("CMYK", (0, 0, 0, 255)), "JPEG", quality=95), (0, 0, 0)),
    ],
)
def test_every_kind_of_picture_becomes_rgb(data, expected):
    pixels = Picture(data).pixels()
    assert pixels.shape == (8, 16, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.reshape(-1, 3).astype(int), np.tile(expected, (128, 1)), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_pixels_are_those_that_pillow_decodes_and_shrinks(kind, shrink):
    data = encoded(photograph(), kind)
    expected = PIL.Image.open(io.BytesIO(data)).convert("RGB").reduce(shrink)
    scratch = Scratch()
    for rows in (None, 120, 50):
        got = Picture(data).pixels(shrink) if rows is None else Picture(data).top_pixels(rows, shrink, scratch)
        rows = rows or 120
        assert len(got) >= rows // shrink
        assert got.shape[1:] == (expected.size[0], 3)
        difference = np.abs(got[: rows // shrink].astype(int) - np.asarray(expected)[: rows // shrink])
        assert difference.mean() < 1.5
    if shrink == 1:
        np.testing.assert_allclose(Picture(data).pixels(), np.asarray(expected), atol=2)


# ---- Pictures that are none.


def test_there_are_thirty_broken_files():
    assert len(broken_files()) >= 30


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_picture_is_an_error_that_says_why(name):
    data = broken_files()[name]
    for read in (Picture.pixels, lambda picture: picture.top_pixels(40, 1, Scratch())):
        with pytest.raises(BrokenPicture, match=r"\w{2}"):
            read(Picture(data))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_pictures_of_the_rarer_kinds_that_are_cut_off_are_broken(kind):
    if kind == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("this Pillow decodes no AVIF")
    whole = encoded(photograph(), kind)
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(BrokenPicture, match=r"\w{2}"):
            Picture(whole[: int(len(whole) * share)]).pixels()


@pytest.mark.parametrize(
    ("mode", "options", "size"),
    [
        ("RGB", {}, (9000, 9000)),
        ("RGB", {}, (161, 1000)),
        ("RGB", {"progressive": True}, (1000, 1000)),
        ("RGB", {"restart_marker_rows": 1}, (1000, 1000)),
        ("L", {}, (161, 1000)),
        ("CMYK", {}, (1000, 120)),
    ],
)
def test_a_jpeg_that_holds_less_than_it_claims_is_broken(mode, options, size):
    """libjpeg only warns of it, and puts grey where nothing is."""
    data = jpeg_claiming(*size, encoded(photograph().convert(mode), "JPEG", **options))
    for read in (
        Picture.pixels,
        lambda picture: picture.pixels(4),
        lambda picture: picture.pixels(channels=1),
        lambda picture: picture.top_pixels(40, 1, Scratch()),
        lambda picture: picture.top_pixels(picture.height, 8, Scratch()),
    ):
        with pytest.raises(BrokenPicture, match="it holds less than its header claims"):
            read(Picture(data))


def test_a_jpeg_with_little_in_its_lower_part_is_not_broken():
    pixels = np.full((400, 300, 3), 255, np.uint8)
    pixels[:60] = np.random.default_rng(0).integers(0, 256, (60, 300, 3))
    data = encoded(PIL.Image.fromarray(pixels), "JPEG", optimize=True)
    top = Picture(data).top_pixels(64, 1, Scratch())
    assert np.abs(top[:64].astype(int) - Picture(data).pixels()[:64]).mean() < 1.5


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg", "wide_bomb.png"])
def test_a_decompression_bomb_is_refused_by_its_header(name):
    with pytest.raises(BrokenPicture, match=r"pixels|[Dd]ecompression bomb"):
        Picture(broken_files()[name])


def test_a_kind_of_file_that_pillow_reads_by_starting_a_program_is_refused():
    with pytest.raises(BrokenPicture, match="no image of a known kind"):
        Picture(encoded(photograph(), "EPS"))


def test_threads_that_open_pictures_leave_the_programs_warnings_as_they_are(monkeypatch):
    """Two threads open a PNG at the same time, the first that began being the first to end."""
    import threading
    import warnings

    def opening(*args, open=PIL.Image.open, **options):
        both.wait(10)
        if threading.current_thread() is second:
            first.join(10)
        return open(*args, **options)

    data, both = encoded(flat("L", 90)), threading.Barrier(2)
    first, second = (threading.Thread(target=Picture, args=(data,)) for _ in range(2))
    monkeypatch.setattr(PIL.Image, "open", opening)
    with warnings.catch_warnings():  # or else a failure here would hide the warnings of other tests
        before = list(warnings.filters)
        for thread in (first, second):
            thread.start()
        for thread in (first, second):
            thread.join(10)
        assert warnings.filters == before


def test_a_large_color_profile_or_text_does_not_break_a_png():
    """Pillow refuses both of more than a megabyte."""
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 3_000_000, zip=True)
    profile = np.random.default_rng(0).bytes(3_000_000)
    for options in ({"pnginfo": text}, {"icc_profile": profile}, {"icc_profile": b"x" * 3_000_000}):
        data = encoded(palette(), transparency=0, **options)
        with pytest.raises(ValueError, match="too large"):
            PIL.Image.open(io.BytesIO(data)).load()
        assert Picture(data).pixels()[3, 3].tolist() == [200, 100, 50]
    whole = encoded(photograph())
    late = whole[:-12] + data[data.index(b"iCCP") - 4 : data.index(b"PLTE") - 4] + whole[-12:] + b"trailing bytes"
    np.testing.assert_array_equal(Picture(late).pixels(), Picture(whole).pixels())


def test_odd_metadata_and_trailing_bytes_do_not_break_a_picture():
    whole = encoded(photograph(), "JPEG")
    for data in (whole + b"\0" * 100, whole[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + whole[2:]):
        np.testing.assert_allclose(Picture(data).pixels(), Picture(whole).pixels(), atol=2)
