"""Folders of pictures: classes, splits, slices, what is taken for a picture, and what can be wrong."""

import logging
import os
import pathlib
import pickle
import shutil

import jax
import numpy as np
import PIL.features
import PIL.Image
import pytest
from helpers import encoded, flat, save

from resattn_jax.data.pictures import Picture
from resattn_jax.data.pipelines import TrainingData, for_evaluation, open_eval
from resattn_jax.data.sources import open_source
from resattn_jax.errors import UsageError
from resattn_jax.run import Run
from resattn_jax.runtime import CPU, make_mesh


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


@pytest.mark.parametrize(
    ("there", "asked", "taken"),
    [
        (["train", "valid", "test"], "val", "valid"),
        (["train", "validation", "dev", "test"], "val", "validation"),
        (["train", "dev", "test"], "validation", "dev"),
        (["train", "val", "valid"], "dev", "val"),
        (["train", "test"], "val", "test"),
        (["train", "valid"], "test", "valid"),
        (["train", "val", "test"], "val", "val"),
        (["train", "val", "test"], "test", "test"),
    ],
)
def test_another_name_of_the_split_is_taken_with_a_warning(tmp_path, caplog, there, asked, taken):
    for split in there:
        for name in "ab":
            save(tmp_path / split / name / "1.png", "red")
    with caplog.at_level(logging.WARNING, "resattn_jax"):
        assert f"/{taken}/a/" in opened(tmp_path, asked).name(0)
    kind = "test" if asked == "test" else "validation"
    expected = [f"there is no folder {asked}; {kind} pictures are those of {taken}"]
    assert [r.getMessage() for r in caplog.records] == (expected if asked != taken else [])


def names_in(source):
    return [source.name(row) for row in range(len(source))]


def test_slices_cut_a_set_into_parts_with_nothing_in_common(folder):
    """A slice in percent holds the pictures whose hash lies in that range: 80 % are about 24 of 30, not exactly."""
    train, held_out = opened(folder, "train[:80%]"), opened(folder, "train[80%:]")
    assert (len(train), len(held_out)) == (26, 4)  # these 30 names always; 24 and 6 would need the number of pictures
    names = [set(names_in(s)) for s in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 30
    assert {train[row][1] for row in range(len(train))} == {0, 1, 2}
    assert names_in(opened(folder, "train[-20%:]")) == names_in(held_out)
    assert len(opened(folder, "train[3:5]")) == 2
    assert len(opened(folder, "train[-4:]")) == 4
    assert names_in(opened(folder, "train[:10]")) + names_in(opened(folder, "train[10:]")) == names_in(
        opened(folder, "train[:100%]")
    )
    assert len(open_source("digits", "train[:50%]")) == 718


def test_a_picture_that_comes_or_goes_moves_no_other_to_another_slice(tmp_path):
    for row in range(200):
        save(tmp_path / "train" / "abcd"[row % 4] / f"IMG_{row}.png", "red")

    def slices():
        parts = opened(tmp_path, "train[:90%]"), opened(tmp_path, "train[90%:]")
        for part in parts:
            assert {part[row][1] for row in range(len(part))} == {0, 1, 2, 3}
        return [set(names_in(part)) for part in parts]

    train, held_out = slices()
    assert 170 <= len(train) <= 190
    assert len(train) + len(held_out) == 200
    (tmp_path / "train/a/IMG_0.png").unlink()
    save(tmp_path / "train" / "b" / "new.png", "red")
    for before, after in zip((train, held_out), slices(), strict=True):
        assert {name for name in before ^ after} <= {
            str(tmp_path / "train/a/IMG_0.png"),
            str(tmp_path / "train/b/new.png"),
        }
    elsewhere = tmp_path / "moved"
    (tmp_path / "train").rename(tmp_path / "all")
    elsewhere.mkdir()
    (tmp_path / "all").rename(elsewhere / "train")
    moved = {name.replace("/moved/", "/") for name in names_in(opened(elsewhere, "train[90%:]"))}
    assert moved - held_out <= {str(tmp_path / "train/b/new.png")}


def test_without_folders_for_splits_each_folder_is_a_class(folder):
    """The same pictures as of DIR/train, on the same sides of a slice."""
    flat = folder / "train"
    for split in ("train", "train[:80%]", "train[80%:]"):
        assert names_in(opened(flat, split)) == names_in(opened(folder, split))
    with pytest.raises(UsageError, match=r"has no folder 'val'; it has a, b, c; .*'train\[90%:\]'"):
        opened(flat, "val")
    (folder / "train").rename(folder / "Train")  # no class of its own beside val
    with pytest.raises(UsageError, match=r"has no folder 'train'; it has Train, val"):
        opened(folder, "train")


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ("nothing", "trian", "has no folder 'trian'; it has train, val"),
        ("nothing", "train[10%", r"'train\[10%' is no split; write 'train', 'train\[:90%\]'"),
        ("nothing", "train[:0%]", "is empty: there are 30 examples in 'train'"),
        ("one class", "train", "has one class, 'a'; there must be two or more"),
        ("no class", "train", "has no folders; each class needs one"),
        ("no pictures", "train", r"has no pictures; their names must end in one of .jpg, .jpeg, .png, .webp"),
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


# ---- What lies in a folder.


KINDS = {
    "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "JPG": "JPEG", "png": "PNG", "webp": "WEBP",
    "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "pnm": "PPM", "pgm": "PPM", "pbm": "PPM",
    "avif": "AVIF",
}  # fmt: skip


@pytest.mark.parametrize("suffix", KINDS)
def test_a_folder_has_all_kinds_of_pictures_that_can_be_decoded(tmp_path, suffix):
    if suffix == "avif" and not PIL.features.check("avif"):
        pytest.skip("this Pillow decodes no AVIF")
    mode, color = {"pgm": ("L", 90), "pbm": ("1", 1)}.get(suffix, ("RGB", (200, 100, 50)))
    for name in "ab":
        save(tmp_path / "train" / name / "1.png", "red")
    PIL.Image.new(mode, (40, 30), color).save(tmp_path / "train/a" / f"2.{suffix}", KINDS[suffix])
    source = opened(tmp_path, "train")
    assert len(source) == 3
    (row,) = (row for row in range(3) if source.name(row).endswith(f"2.{suffix}"))
    expected = PIL.Image.new(mode, (1, 1), color).convert("RGB").getpixel((0, 0))
    np.testing.assert_allclose(Picture(source[row][0]).pixels()[9, 9], expected, atol=4)


def test_other_files_are_counted_and_told_of(folder, caplog):
    for name in ("1.csv", "2.CSV", "deeper/3.csv", "deeper/README", "notes.txt"):
        (folder / "train/b" / name).parent.mkdir(exist_ok=True)
        (folder / "train/b" / name).write_text("no picture")
    save(folder / "train" / "beside.png", "red")
    (folder / "train/labels.csv").write_text("of no class")
    with caplog.at_level(logging.WARNING, "resattn_jax"):
        assert len(opened(folder, "train")) == 30
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "passed over 6 files that are no pictures by their names: .csv (3), .txt (2), no ending (1);"
        f" in {folder / 'train'}",
        f"passed over pictures in no class's folder: 1; in {folder / 'train'}",
    ]


def test_linked_folders_are_followed_and_loops_are_not(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "more" / "deeper" / "1.png", "red")
    save(elsewhere / "d" / "1.png", "red")
    train = folder / "train"
    (train / "a/more").symlink_to(elsewhere / "more")
    (train / "d").symlink_to(elsewhere / "d")  # a class of its own
    before = len(opened(folder, "train"))
    assert before == 32
    (elsewhere / "more/deeper/up").symlink_to(elsewhere / "more")
    (train / "a/itself").symlink_to(train / "a")
    (train / "a/all").symlink_to(train)  # would bring the other classes' pictures
    (train / "a/root").symlink_to("/")
    (train / "a/once_more").symlink_to(elsewhere / "more")
    (elsewhere / "d/up").symlink_to(elsewhere)
    (train / "a/nowhere").symlink_to(elsewhere / "nowhere")
    (train / "a/round").symlink_to(train / "a/round")
    source = opened(folder, "train")
    assert len(source) == before
    assert {source[row][1] for row in range(before) if "/more/" in source.name(row)} == {0}


def test_a_class_may_have_any_name(tmp_path):
    names = sorted(
        [b"a\nb", b"[red]x[bold]", "caf\u00e9".encode("latin-1"), "\u96ea".encode(), b"a b'\"%s{}", b"A", b"a"]
    )
    for name in names:
        for row in range(20):
            folder = os.path.join(os.fsencode(tmp_path), b"train", name)
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, b"%d\n\xe9.png" % row), "wb") as file:
                file.write(encoded(flat("RGB", (10 * row, 0, 0))))
    for split in ("train", "train[:50%]"):
        source = pickle.loads(pickle.dumps(opened(tmp_path, split)))
        assert sorted(map(os.fsencode, source.class_names)) == names
        assert {source[row][1] for row in range(len(source))} == set(range(len(names)))
        for name in names_in(source):
            assert name.encode().decode().isprintable()
    examples = [opened(tmp_path, "train")[row] for row in range(140)]
    assert [label for _, label in examples] == [label for label in range(7) for _ in range(20)]


def test_only_regular_files_of_a_size_that_pictures_have_are_opened(folder):
    train = folder / "train"
    os.mkfifo(train / "a/pipe.jpg")
    (train / "b/zero.jpg").symlink_to("/dev/zero")
    (train / "b/nowhere.jpg").symlink_to("/no/such/file")
    with open(train / "c/large.jpg", "wb") as file:
        file.truncate((256 << 20) + 1)
    source = opened(folder, "train")
    said = {}
    for row, name in enumerate(names_in(source)):
        try:
            source[row]
        except OSError as error:
            said[name.rpartition("/")[2]] = str(error)
    assert said["pipe.jpg"] == said["zero.jpg"] == "it is no regular file"
    assert said["large.jpg"] == "it has 256 MB, more than 256"
    assert "No such file" in said["nowhere.jpg"]
    assert len(said) == 4


def test_a_message_lists_no_more_than_ten_names(tmp_path):
    for row in range(1000):
        (tmp_path / f"n{row:04}").mkdir()
    with pytest.raises(UsageError, match=r"it has n0000, .*, n0009 and 990 others; it needs"):
        opened(tmp_path, "val")


def test_a_run_says_when_its_pictures_are_others(tmp_path, tiny_config, caplog):
    """Their number is the same, and so is everything else that a run compares."""
    for row in range(20):
        save(tmp_path / ("train" if row < 16 else "val") / ["cat", "dog"][row % 2] / f"{row}.png", "red")
    tiny_config.update(batch_size=16, steps_per_dispatch=None)
    tiny_config.data.update(name=f"folder:{tmp_path}", eval_split="val", image_size=16, mean_image=False)
    run = Run(tmp_path / "run")

    def notes():
        with run.writing(tiny_config, TrainingData(tiny_config).spec, first_host=True) as told:
            return told

    assert notes() == notes() == []
    shutil.move(tmp_path / "train", tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere", tmp_path / "train")  # where they lie is no matter
    assert notes() == []
    (tmp_path / "val/cat/18.png").rename(tmp_path / "val/cat/new.png")
    said = "the pictures of 'val' are not those that this run began with: some came, went or were renamed"
    assert notes() == notes() == [said]  # not only once
    spec = for_evaluation(tiny_config, run.spec)
    open_eval(tiny_config, spec, make_mesh(jax.devices()[:1]), CPU, batch_size=4)
    assert said in caplog.text
    (tmp_path / "val/cat/new.png").rename(tmp_path / "val/cat/18.png")
    (tmp_path / "train/dog/3.png").rename(tmp_path / "train/dog/33.png")
    assert notes() == [said.replace("val", "train")]
