"""Sources other than the small sets of test_data: folders, slices, pictures of every kind, and what can be wrong."""

import io
import pathlib
import pickle
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from resattn_jax.data.pictures import BrokenPicture, Picture, Scratch
from resattn_jax.data.sources import open_source
from resattn_jax.errors import UsageError


def save(path, color, size=(40, 30), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path, kind)


@pytest.fixture
def folder(tmp_path):
    """Three classes in the order b, a, c of their making; 10 pictures each to train on, 2 each to measure by."""
    for name, color in {"b": "green", "a": "red", "c": "blue"}.items():
        for i in range(10):
            save(tmp_path / "train" / name / f"{i}.{['jpg', 'png', 'webp', 'JPEG'][i % 4]}", color)
        for i in range(2):
            save(tmp_path / "val" / name / "deeper" / f"{i}.jpg", color)
    (tmp_path / "train/a/notes.txt").write_text("no picture")
    (tmp_path / "train/a/.hidden.jpg").write_text("no picture")
    save(tmp_path / "train" / "a" / ".ipynb_checkpoints" / "1-checkpoint.jpg", "red")
    return tmp_path


def opened(folder, split):
    return open_source(f"folder:{folder}", split)


def test_labels_count_the_sorted_names_of_the_classes(folder):
    source = opened(folder, "train")
    assert source.class_names == ("a", "b", "c")
    assert len(source) == 30
    colors = np.array([[255, 0, 0], [0, 128, 0], [0, 0, 255]])
    for row in range(30):
        data, label = source[row]
        np.testing.assert_allclose(Picture(data).pixels()[5, 5], colors[label], atol=8)
        assert f"/{'abc'[label]}/" in source.name(row)


def test_what_is_measured_may_be_called_val_or_test(folder):
    assert len(opened(folder, "val")) == len(opened(folder, "test")) == 6
    (folder / "test").mkdir()
    with pytest.raises(UsageError, match="test has no folders"):
        opened(folder, "test")


def test_slices_cut_a_set_into_parts_with_all_classes_and_nothing_in_common(folder):
    train, held_out = opened(folder, "train[:80%]"), opened(folder, "train[80%:]")
    assert (len(train), len(held_out)) == (24, 6)
    names = [{s.name(row) for row in range(len(s))} for s in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 30
    assert {train[row][1] for row in range(24)} == {0, 1, 2}
    assert len(opened(folder, "train[3:5]")) == 2
    assert len(opened(folder, "train[-4:]")) == 4
    assert len(open_source("digits", "train[:50%]")) == 718


def test_tfds_sets_of_any_size_and_their_slices(tfds_dir):
    train = open_source("imagenet2012", "train", tfds_dir)
    assert (len(train), len(train.class_names), train.image_shape) == (300, 1000, None)
    assert len(open_source("imagenet2012", "train[:90%]", tfds_dir)) == 270
    data, label = train[7]
    assert PIL.Image.open(io.BytesIO(data)).format == "JPEG"
    wordnet_id = train.class_names[label]
    assert wordnet_id in train.name(7)  # its file name begins with the class's: n01440764_1234.JPEG


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ("nothing", "trian", "has no folder 'trian'; it has train, val"),
        ("nothing", "train[10%", r"'train\[10%' is no split; write 'train', 'train\[:90%\]'"),
        ("nothing", "train[:0%]", "is empty: there are 30 examples in 'train'"),
        ("one class", "train", "has one class, 'a'; there must be two or more"),
        ("no class", "train", "has no folders; each class needs one"),
        ("no pictures", "train", r"has no pictures; they are known by their names' ends: .jpg, .jpeg, .png, .webp"),
        ("an empty class", "train", "train/d has no pictures; remove it or fill it"),
        ("no val", "val", r"has no folder 'val'; it has train; .*'train\[90%:\]'"),
        ("no folder", "train", "there is no folder .*; folder:DIR needs DIR/train/CLASS"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(folder, change, split, message):
    import shutil

    if change == "one class":
        shutil.rmtree(folder / "train/b")
        shutil.rmtree(folder / "train/c")
    elif change == "no class":
        shutil.rmtree(folder / "train")
        save(folder / "train" / "1.jpg", "red")
    elif change == "no pictures":
        for path in filter(pathlib.Path.is_file, (folder / "train").rglob("*.*")):
            path.unlink()
    elif change == "an empty class":
        (folder / "train/d").mkdir()
    elif change == "no val":
        shutil.rmtree(folder / "val")
    elif change == "no folder":
        shutil.rmtree(folder)
    with pytest.raises(UsageError, match=message):
        opened(folder, split)


@pytest.mark.parametrize("name", ["folder", "synthetic", "digits", "imagenet2012"])
def test_a_source_can_be_sent_to_another_process(name, folder, request):
    data_dir = request.getfixturevalue("tfds_dir") if name == "imagenet2012" else None
    source = open_source(f"folder:{folder}" if name == "folder" else name, "train", data_dir)
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


# ---- Pictures of every kind.


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode, color, size=(16, 8)):
    return PIL.Image.new(mode, size, color)


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


def photograph(height=120, width=161):
    """A smooth picture, as Pillow sees it."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(x / a + y / b) for a, b in ((17, 29), (23, -19), (-31, 13))]
    return PIL.Image.fromarray(np.stack(channels, -1).astype(np.uint8))


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


def png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def jpeg_claiming(width, height):
    data = bytearray(encoded(photograph(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def broken_files():
    """More than 30: empty, cut off at many places, another format, garbage, bombs."""
    files = {"empty.jpg": b"", "newline.png": b"\n", "text.jpg": b"this is no picture", "page.png": b"<!DOCTYPE html>"}
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(photograph(), kind)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"cut{share}.{kind.lower()}"] = whole[: int(len(whole) * share)]
        files[f"no_head.{kind.lower()}"] = whole[40:]
        if kind != "WEBP":  # where zeros are a picture like any other
            files[f"zeros.{kind.lower()}"] = whole[:30] + bytes(len(whole))
    files["bomb.png"] = png_claiming(60_000, 60_000)
    files["wide_bomb.png"] = png_claiming(1_000_000, 1_000)
    files["bomb.jpg"] = jpeg_claiming(60_000, 60_000)
    files["no_size.png"] = png_claiming(0, 0)
    files["short_pixels.png"] = png_claiming(300, 300)
    files["random.jpg"] = np.random.default_rng(0).bytes(5000)
    files["random.webp"] = b"RIFF\x00\x10\x00\x00WEBPVP8 " + np.random.default_rng(1).bytes(4096)
    return files


def test_there_are_thirty_broken_files():
    assert len(broken_files()) >= 30


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_picture_is_an_error_that_says_why(name):
    data = broken_files()[name]
    for read in (Picture.pixels, lambda picture: picture.top_pixels(40, 1, Scratch())):
        with pytest.raises(BrokenPicture, match=r"\w{2}"):
            read(Picture(data))


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


def test_odd_metadata_and_trailing_bytes_do_not_break_a_picture():
    whole = encoded(photograph(), "JPEG")
    for data in (whole + b"\0" * 100, whole[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + whole[2:]):
        np.testing.assert_allclose(Picture(data).pixels(), Picture(whole).pixels(), atol=2)
