"""Checkpoints can be trusted: what is read is what was written, or it is told; and there is always the one before."""

import errno
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits

from resattn_jax.checkpoint import Reader, Writer
from resattn_jax.checksums import checksums
from resattn_jax.errors import RunError, UsageError
from resattn_jax.modes.train import train_and_evaluate
from resattn_jax.state import Progress, TrainState

# Of a checkpoint with several broken files Orbax raises one error, and leaves the others to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WEIGHTS = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)


def state_of(step):
    """A small state whose values tell the step."""
    params = {"head": {"kernel": jnp.asarray(WEIGHTS) + step, "bias": jnp.arange(5.0)}}
    stats = {"norm": {"mean": jnp.full(7, 0.5)}}
    ema = jax.tree.map(lambda x: x * 2, {"params": params, "batch_stats": stats})
    return TrainState(jnp.int32(step), params, stats, ({"trace": params}, ()), ema)


def like():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_of(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of steps 5, 10 and 15, of which 10 is the best."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Writer(folder, keep_newest=9) as checkpoints:
        for step, top1 in ((5, 0.1), (10, 0.3), (15, 0.2)):
            progress = Progress(best={"top1": top1, "step": step}, train_images=step)
            checkpoints.save(state_of(step), progress, {"top1": top1})
            checkpoints.wait()
            assert checkpoints.saved == step, checkpoints.failure
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return pathlib.Path(shutil.copytree(written, tmp_path / "checkpoints"))


def restored(folder, said):
    """What a run would go on from: the step and its state."""
    with Writer(folder, say=said.append) as checkpoints:
        step, (state, progress) = checkpoints.first_readable(
            checkpoints.find("newest"), lambda s: checkpoints.restore(s, like())
        )
    return step, state, progress


def files_of(folder, step):
    return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file())


def test_what_is_read_is_what_was_written(folder):
    said = []
    step, state, progress = restored(folder, said)
    assert (step, said) == (15, [])
    assert_same_bits(state, state_of(15))
    assert progress == Progress(best={"top1": 0.2, "step": 15}, train_images=15)


def test_no_bit_of_200_changes_the_weights_without_a_word(folder):
    """A bit of a file of the newest step is turned: the same state, or a line and the state of the step before."""
    rng = np.random.default_rng(0)
    files = [path for path in files_of(folder, 15) if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files], float)
    unharmed = told = 0
    for turn in range(200):
        # Half of the bits by size, where the weights are; half by file, for the small ones.
        path = files[rng.choice(len(files), p=sizes / sizes.sum() if turn % 2 else None)]
        whole = path.read_bytes()
        bit = int(rng.integers(8 * len(whole)))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        said = []
        with Reader(folder, say=said.append) as checkpoints:
            step, (state, progress) = checkpoints.first_readable(
                checkpoints.find("newest"), lambda s, c=checkpoints: c.restore(s, like())
            )
        assert_same_bits(state, state_of(step))
        assert progress.train_images == step
        assert (step == 15) != bool(said), (path, bit, said)
        unharmed, told = unharmed + (step == 15), told + (step == 10)
        path.write_bytes(whole)
    assert unharmed + told == 200
    assert told > 100


def damage_by_cutting(folder):
    for path in files_of(folder, 15):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(pattern, how):
    def do(folder):
        paths = [p for p in (folder / "15").rglob("*") if p.match(pattern)]
        assert paths
        for path in paths:
            if how == "missing":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif how == "empty":
                path.write_bytes(b"")
            elif how == "cut":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            elif how == "a folder":
                path.unlink()
                path.mkdir()
            else:
                path.write_text(how)

    return pytest.param(do, id=f"{pattern} {how}")


@pytest.mark.parametrize(
    "do",
    [
        pytest.param(damage_by_cutting, id="every file cut in half"),
        pytest.param(lambda folder: [p.unlink() for p in files_of(folder, 15)], id="every file gone"),
        pytest.param(lambda folder: (shutil.rmtree(folder / "15"), (folder / "15").mkdir()), id="an empty folder"),
        pytest.param(lambda folder: (folder / "99").mkdir(), id="an empty folder of a later step"),
        damage("15/model", "missing"),
        damage("15/ema", "missing"),
        damage("15/optimizer", "missing"),
        damage("15/progress", "missing"),
        damage("progress/metadata", "cut"),
        damage("progress/metadata", "[]"),
        damage("progress/metadata", "{}"),
        damage("progress/metadata", "a folder"),
        damage("checksums/metadata", "cut"),
        damage("checksums/metadata", "{}"),
        damage("model/manifest.ocdbt", "missing"),
        damage("model/manifest.ocdbt", "empty"),
        damage("model/manifest.ocdbt", "something else"),
        damage("model/_METADATA", "cut"),
        damage("model/_METADATA", "missing"),
        damage("model/d/*", "missing"),
        damage("model/d/*", "cut"),
        damage("ema/ocdbt.process_0/d/*", "missing"),
        damage("ema/ocdbt.process_0/d/*", "empty"),
        damage("optimizer/ocdbt.process_0", "missing"),
    ],
)
def test_a_damaged_newest_step_is_told_set_aside_and_the_one_before_goes_on(folder, do):
    do(folder)
    wrong = max(int(p.name) for p in folder.iterdir())
    said = []
    step, state, _ = restored(folder, said)
    right = 15 if wrong == 99 else 10
    assert step == right
    assert_same_bits(state, state_of(right))
    [line] = said
    assert f"/{wrong} cannot be used: " in line
    assert f"; it is now called {wrong}.damaged" in line
    assert "\n" not in line
    assert (folder / f"{wrong}.damaged").is_dir()
    assert restored(folder, said)[0] == right
    assert len(said) == 1  # it is told once


def test_the_best_and_a_step_by_its_number(folder):
    damage_of_weights = files_of(folder, 10)[-1]
    shutil.rmtree(folder / "10" / "ema")
    said = []
    with Reader(folder, say=said.append) as checkpoints:
        step, variables = checkpoints.first_readable(checkpoints.find("best"), checkpoints.read_eval_variables)
        assert step == 15  # the next best
        np.testing.assert_array_equal(variables["params"]["head"]["kernel"], 2 * (WEIGHTS + np.float32(15)))
        assert len(said) == 1
        with pytest.raises(UsageError, match=r"/10 cannot be used: its item 'ema' is missing"):
            checkpoints.first_readable(checkpoints.find("10"), checkpoints.read_eval_variables)
    assert damage_of_weights.exists()
    assert (folder / "10").is_dir()  # a reader changes nothing


def test_when_none_can_be_read_it_is_an_error(folder):
    for step in (5, 10, 15):
        shutil.rmtree(folder / str(step) / "model")
    with pytest.raises(UsageError, match=r"/5 cannot be used: .*; none of the others can either"):
        restored(folder, [])


def test_the_rest_of_a_save_that_was_cut_off_is_told_and_removed(folder):
    (folder / "20.orbax-checkpoint-tmp").mkdir()
    said = []
    assert restored(folder, said)[0] == 15
    assert said == ["20.orbax-checkpoint-tmp: what a process left that was ended is removed"]
    assert not (folder / "20.orbax-checkpoint-tmp").exists()


def test_a_file_called_checkpoints_is_told_at_once(tiny_config, one_device, tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(UsageError, match=r"checkpoints cannot be used: .*; choose another --workdir"):
        train_and_evaluate(tiny_config, tmp_path, one_device)


def test_a_reader_beside_a_run_that_rotates_its_checkpoints_takes_another(folder):
    """The step that was found is deleted before it is read."""
    with Reader(folder) as checkpoints:
        steps = checkpoints.find("newest")
        shutil.rmtree(folder / "15")
        step, _ = checkpoints.first_readable(steps, checkpoints.read_eval_variables)
    assert step == 10


def test_weights_that_are_not_finite_are_told(tmp_path):
    state = state_of(3)
    state.ema["params"]["head"]["kernel"] = state.ema["params"]["head"]["kernel"].at[3, 4].set(jnp.nan)
    with Writer(tmp_path) as checkpoints:
        checkpoints.save(state, Progress())
    with (
        Reader(tmp_path) as checkpoints,
        pytest.raises(RunError, match=r"not finite: params/head/kernel \(1 of 2,000 values\)"),
    ):
        checkpoints.read_eval_variables(3)


@pytest.mark.parametrize(
    "name", ["my proj [v2]", "a*b?", "back\\slash", "new\nline", "'quotes\"", "100%", "é ü", "\udce9", "{x}", "$HOME;#"]
)
def test_every_name_that_a_file_system_allows_works(name, tmp_path):
    folder = tmp_path / name / "checkpoints"
    (tmp_path / "a-b-neighbour" / "checkpoints").mkdir(parents=True)  # which a pattern would match
    with Writer(folder) as checkpoints:
        checkpoints.save(state_of(1), Progress())
        checkpoints.wait()
        assert checkpoints.saved == 1, checkpoints.failure
    assert (folder / "1" / "model" / "manifest.ocdbt").exists()
    step, state, _ = restored(folder, [])
    assert step == 1
    assert_same_bits(state, state_of(1))


def test_a_save_that_fails_is_told_and_the_next_is_tried(tmp_path, monkeypatch):
    """The disk is full for one save."""
    said = []
    with Writer(tmp_path, say=said.append) as checkpoints:
        checkpoints.save(state_of(1), Progress())
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "save", full)
            checkpoints.save(state_of(2), Progress())
            checkpoints.wait()
        assert checkpoints.saved == 1
        assert said == [
            "the checkpoint of step 2 could not be written: [Errno 28] No space left on device;"
            " training goes on, and the next one is tried"
        ]
        checkpoints.save(state_of(3), Progress())
        checkpoints.wait()
        assert checkpoints.saved == 3
        assert checkpoints.steps() == [1, 3]


def test_what_was_written_is_read_again_before_older_ones_go(tmp_path, monkeypatch):
    """A disk that loses what it is given: the older checkpoint stays, the bad one gets another name."""
    said = []
    with Writer(tmp_path, keep_newest=1, say=said.append) as checkpoints:
        checkpoints.save(state_of(1), Progress())
        checkpoints.wait()
        save = ocp.Checkpointer.save

        def losing(self, path, **options):
            save(self, path, **options)
            shutil.rmtree(path / "model" / "d")

        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "save", losing)
            checkpoints.save(state_of(2), Progress())
            checkpoints.wait()
    assert "the checkpoint of step 2 could not be written: " in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.damaged"]


def test_a_run_whose_last_state_could_not_be_saved_ends_with_an_error(tiny_config, one_device, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(RunError, match=r"the checkpoint of step 12 could not be written: .*No space left on device"):
        train_and_evaluate(tiny_config, tmp_path, one_device)


def test_checksums_are_of_the_bytes():
    """CRC-32, as zlib and every other tool has it: of '123456789' it is cbf43926."""
    digits = np.frombuffer(b"123456789", np.uint8)
    assert checksums({"a": digits, "b": {"c": digits[:0]}}) == {"a": "cbf43926", "b/c": "00000000"}
