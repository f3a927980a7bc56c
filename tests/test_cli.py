"""Command lines, sensible and not: what each is taken for, or the one line that refuses it, at once and without JAX."""

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

from configs import digits
from resattn_jax.rules import RULES
from resattn_jax.run import Run

ROOT = pathlib.Path(__file__).parents[1]

# Parses each line that comes in, an argv as JSON, as a program of its own would.
PROGRAM = """
import json
import sys
import time
from absl import flags
from resattn_jax import cli
from resattn_jax.config import flatten
from resattn_jax.errors import UsageError

for line in sys.stdin:
    for flag in flags.FLAGS:
        flags.FLAGS[flag].unparse()
    began = time.perf_counter()
    try:
        command = cli.parse(["main.py", *json.loads(line)])
        answer = {**vars(command), "run": str(command.run), "config": flatten(command.config)}
        answer["runs"] = list(map(str, command.runs))
    except BaseException as error:
        answer = {"error": type(error).__name__, "says": str(error)}
    answer["seconds"] = time.perf_counter() - began
    answer["imported"] = sorted({"jax", "jaxlib", "flax", "tensorflow", "torch"} & sys.modules.keys())
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """What a command line is taken for, or {"error", "says"}; in another folder than the program's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "PYTHONUTF8": "1"}
    with (
        open(folder / "stderr", "w+") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip

        def answer(*arguments):
            process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert found["seconds"] < 2
            assert found["imported"] == []
            if "error" in found:
                assert found["error"] == "UsageError", (arguments, found)
                assert found["says"].isprintable()  # so it is one line
                assert 10 < len(found["says"]) < 400
            return found

        yield answer
        process.stdin.close()
        process.wait(60)
        errors.seek(0)
        assert errors.read() == ""  # neither do the libraries say anything
    assert list(folder.iterdir()) == [folder / "stderr"]  # no line left anything behind


@pytest.mark.parametrize("package", ["configs", "resattn_jax.configs"])
@pytest.mark.parametrize("path", ["", ROOT])
def test_ones_own_recipe_stands_on_one_on_board(tmp_path, package, path):
    """Where the repository's folder is on the path, and where the package alone is, as after an installation."""
    (tmp_path / "own.py").write_text(
        f"from {package} import digits\ndef get_config():\n c = digits.get_config()\n c.seed = 7\n return c"
    )
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed/resattn_jax").symlink_to(ROOT / "resattn_jax")
    program = "from resattn_jax import cli; print(cli.parse(['', '--config=own.py']).config.seed)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'installed'}{os.pathsep}{path}".rstrip(os.pathsep)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr


@pytest.fixture
def run(tmp_path):
    """A run of digits with another seed, as far as the command line looks at it."""
    run, config = Run(tmp_path / "run"), digits.get_config()
    config.seed = 7
    run.path.mkdir()
    run.write("config.json", json.dumps(config.to_dict()))
    return run


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ([], "data.name", "digits"),  # the recipe is found from any folder
        (["--config=configs/paper_cifar.py:net=ra56_cifar_slim,noise=0.3"], "data.label_noise", 0.3),
        (["--config", "configs/cifar10_ra92.py"], "total_epochs", 300.0),
        (["-config=configs/cifar10_ra92.py"], "batch_size", 64),
        (["--config=configs/digits.py", "--config=configs/cifar10_ra92.py"], "data.name", "cifar10"),
        (["--config.batch_size=32", "--config=configs/cifar10_ra92.py"], "batch_size", 32),  # in any order
        (["--config.batch_size", "32"], "batch_size", 32),
        (["--config.batch_size=16", "--config.batch_size=32"], "batch_size", 32),
        (["--config.augment.flip"], "augment.flip", True),
        (["--noconfig.optimizer.nesterov"], "optimizer.nesterov", False),
        (["--config.augment.flip=T"], "augment.flip", True),
        (["--config.model.remat=1"], "model.remat", True),
        (["--config.optimizer.weight_decay=1e-3"], "optimizer.weight_decay", 1e-3),
        (["--config.total_steps=5"], "total_epochs", None),
        (["--config.total_epochs=5"], "total_epochs", 5.0),
        (["--config.ema_decay=None"], "ema_decay", None),
        (["--config.ema_decay", "None"], "ema_decay", None),
        (["--config.data.dir=None"], "data.dir", None),
        (["--config.data.dir=none"], "data.dir", "none"),
        (["--config.eval.views=2"], "eval.views", 2),
        (["--config.data.mean=(0.1, 0.2, 0.3)"], "data.mean", [0.1, 0.2, 0.3]),
        (["--config.data.mean=0.1,0.2,0.3"], "data.mean", [0.1, 0.2, 0.3]),
        (["--config.data.mean=[0.25]"], "data.mean", [0.25]),
        (["--config.data.std=0.25"], "data.std", [0.25]),
        (["--config.schedule.boundaries=('30%', '5 epochs')"], "schedule.boundaries", ["30%", "5 epochs"]),
        (["--config.schedule.boundaries=500 steps"], "schedule.boundaries", ["500 steps"]),
        (["--config.schedule.boundaries=()"], "schedule.boundaries", []),
        (["--config.data.name=folder:/a b/größer=x"], "data.name", "folder:/a b/größer=x"),
        (["--config.data.eval_split=train[90%:]"], "data.eval_split", "train[90%:]"),
        (["--config.seed=4294967295"], "seed", 2**32 - 1),
    ],
)
def test_what_a_command_line_sets(parse, arguments, key, value):
    assert parse(*arguments)["config"][key] == value


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.batch_size=None"], "config.batch_size is None; it must be 1 or more"),
        (["--config.data.name=None"], "config.data.name is None; write digits"),
        (["--config.augment.flip=None"], "config.augment.flip is None; it must be True or False"),
        (["--config.schedule.boundaries=None"], "config.schedule.boundaries is None; write durations"),
        (["--config.total_epochs=None"], "config.total_steps is None and config.total_epochs is None; exactly one"),
        (["--config.total_epochs=3", "--config.total_steps=4"], "set config.total_steps or config.total_epochs, not"),
        (["--config.batch_size=many"], "config.batch_size is 'many'; it must be 1 or more, a whole number"),
        (["--config.batch_size=6.5"], "config.batch_size is '6.5'; it must be 1 or more, a whole number"),
        (["--config.batch_size=٣"], "config.batch_size is '٣'; it must be"),
        (["--config.batch_size=" + "9" * 5000], "config.batch_size is '999"),
        (["--config.batch_size"], "--config.batch_size has no value; it is written --config.batch_size=VALUE"),
        (["--config.batch_size="], "config.batch_size is ''; it must be"),
        (["--config.batch_size", "--mode=train"], "config.batch_size is '--mode=train'; it must be"),
        (["--config.ema_decay=nan"], "config.ema_decay is nan; it must be from 0 to less than 1"),
        (["--config.ema_decay=1e400"], "config.ema_decay is inf; it must be"),
        (["--config.augment.flip=ture"], "config.augment.flip is 'ture'; it must be True or False"),
        (["--config.augment.flip", "false"], "unexpected argument 'false'"),
        (["--noconfig.seed"], "--noconfig.seed: it is written --config.KEY=VALUE"),
        (["--noconfig.augment.flip=True"], "--noconfig.augment.flip=True: it is written --config.KEY=VALUE"),
        (["--config.data.mean=(0x" + "f" * 400 + ",)"], "config.data.mean is (4446241647709"),
        (["--config.data.mean=('\\d',)"], r"config.data.mean is ('\\d',); write 1 to 4 numbers"),
        (["--config.data.mean=" + "(" * 400], "config.data.mean is ('(((("),
        (["--config.data.mean=" + "-" * 900 + "1"], "config.data.mean is ('---"),
        (["--config.data.mean={[]}"], "config.data.mean is ('{[]}',); write"),
        (["--config.model={}"], "there is no config.model"),
        (["--config.model.items=3"], "there is no config.model.items"),
        (["--config.data.mean[0]=3"], "there is no config.data.mean[0] (did you mean 'config.data.mean'?)"),
        (["--config.=3"], "there is no config."),
        (["--config.a\nb=3"], "there is no config.a\\nb"),
        (["--config." + "x" * 5000], "there is no config.xxx"),
        (["--config=", "--mode=train"], "there is no config ''; on board are cifar100_ra92, "),
        (["--config"], "--config has no value"),
        (["--config=configs"], "there is no config 'configs'"),
        (["--config=" + "x" * 5000], "there is no config 'xxx"),
        (["--config=configs/digits.py:x"], "the config 'configs/digits.py:x' does not load: TypeError: get"),
        (["--config=digit"], "there is no config 'digit' (did you mean 'digits'?); on board are cifar100_ra92, "),
        (["--config=default"], "there is no config 'default'"),
        ([f"--config={ROOT / 'configs/default.py'}"], "exactly one of them must be set"),
        ([f"--config={ROOT / 'main.py'}"], "main.py' does not load: KeyError: 'get_config'"),
        ([f"--config={ROOT / 'setup.py'}"], "setup.py' does not load: SystemExit: usage: "),
        ([f"--config={ROOT / 'README.md'}"], "README.md' does not load: SyntaxError: "),
        ([f"--config={ROOT / 'tests/data/run_dd52f1e.tar.gz'}"], "does not load: "),
        (["--wrkdir=x"], "there is no flag --wrkdir (did you mean '--workdir'?)"),
        (["--" + "x" * 5000], "there is no flag --xxx"),
        (["--mode=" + "x" * 5000], "value should be one of <train|evaluate|"),
        (["--mode"], "Missing value for flag --mode"),
        (["--workdir="], "--workdir= is no path"),
        (["--workdir=~nobody-is-called-so/x"], "--workdir=~nobody-is-called-so/x is no path"),
        (["--workdir=s3://bucket/x"], "s3://bucket/x is no path; a folder in a bucket is written gs://BUCKET/FOLDER"),
        (["--workdir=http://a/b"], "http://a/b is no path; a folder in a bucket is written gs://BUCKET/FOLDER"),
        (["--workdir=gs://bucket"], "gs://bucket: write gs://BUCKET/FOLDER, of letters, digits, and .,_-+=@"),
        (["--workdir=gs://bucket/a*b"], "gs://bucket/a*b: write gs://BUCKET/FOLDER"),
        (["--workdir=gs://bucket/a/../b"], "gs://bucket/a/../b: write gs://BUCKET/FOLDER"),
        (["--mode=export", "--output=s3://bucket/x"], "s3://bucket/x is no path; a folder in a bucket"),
        (["--mode=import", "--torch_checkpoint=gs://b/x.pth"], "=gs://b/x.pth is no path; PyTorch's files are read"),
        (["--workdir=" + "x" * 5000], ": File name too long"),
        (["--workdir=a\0b"], "embedded null byte"),
        ([f"--workdir={ROOT / 'main.py'}"], "main.py is a file; name a folder"),
        ([f"--workdir={ROOT / 'main.py/x'}"], ": Not a directory"),
        (["--checkpoint=best"], "--checkpoint is for --mode=evaluate and --mode=predict and"),
        (["--mode=prepare", "--workdir=x"], "--workdir is for --mode=train and --mode=evaluate and"),
        (["--mode=evaluate", "--output=x"], "--mode=report and --mode=export, not for --mode=evaluate"),
        (["--mode=evaluate", "--checkpoint=²"], "--checkpoint=²: it must be newest, best or the number of a step"),
        (["--mode=evaluate", "--checkpoint=-3"], "--checkpoint=-3: it must be"),
        (["--mode=export"], "--mode=export needs --output=PATH or --torch_checkpoint=PATH, one of them"),
        (["--mode=export", "--output=a", "--torch_checkpoint=b"], "--mode=export needs --output=PATH or"),
        (["--mode=export", f"--torch_checkpoint={ROOT}"], "is a folder; name a file"),
        (["--mode=export", "--output="], "--output= is no path"),
        (["--mode=export", "--output=a", "--format=onix"], "--format=onix (did you mean 'onnx'?): it must be one or"),
        (["--mode=export", "--output=a", "--format="], "--format=: it must be one or more of safetensors, torch, sta"),
        (["--mode=export", "--torch_checkpoint=b.pth", "--format=onnx"], "--format=onnx needs --output=DIR, the"),
        (["--mode=evaluate", "--format=onnx"], "--format is for --mode=export, not for --mode=evaluate"),
        (["--mode=import"], "--mode=import needs --torch_checkpoint=PATH"),
        (["--mode=predict"], "--mode=predict needs --images=PATH"),
        (["--mode=attention"], "--mode=attention needs --images=PATH or --summary, one of them"),
        (["--mode=attention", "--nosummary"], "--mode=attention needs --images=PATH or --summary, one of them"),
        (["--mode=attention", "--images=a", "--summary"], "needs --images=PATH or --summary, one of them"),
        (["--mode=predict", "--images=a", f"--output={ROOT}"], "is a folder; name a file"),
        (["--mode=attention", "--images=a", f"--output={ROOT}/main.py"], "is a file; name a folder"),
        (["--mode=predict", "--images=a", "--top=0"], "--top"),
        (["--images=a"], "--images is for --mode=predict and --mode=attention, not for --mode=train"),
        (["--num_processes=2"], "--coordinator, --num_processes and --process_id need each other"),
        (["--coordinator=a:1"], "--coordinator, --num_processes and --process_id need each other"),
        (["--coordinator=a", "--num_processes=2", "--process_id=1"], "--coordinator=a: it is written HOST:PORT"),
        (["--coordinator=a:99999", "--num_processes=2", "--process_id=1"], "it is written HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2: it must be less than"),
        (["--coordinator=a:1", "--num_processes=0", "--process_id=0"], "flag --num_processes=0: 0 is not an"),
        (["--flagfile=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_what_a_command_line_cannot_mean_is_one_line(parse, arguments, says):
    assert says in parse(*arguments)["says"]


def test_paths_begin_at_the_home_folder(parse):
    home = parse("--workdir=~/a")["run"].removesuffix("/a")
    assert home.endswith("/home")
    export = ["--mode=export", "--config=configs/digits.py"]
    assert parse(*export, "--output=~/b")["output"] == f"{home}/b"
    assert parse(*export, "--torch_checkpoint=~/c.pth")["torch_checkpoint"] == f"{home}/c.pth"
    assert str(Run("~/run")) == os.path.expanduser("~/run")  # which is how init_from is opened


def test_formats_are_given_with_commas_or_one_by_one(parse):
    export = ["--mode=export", "--config=configs/digits.py", "--output=a"]
    assert parse(*export)["formats"] == []
    assert parse(*export, "--format=onnx,torch", "--format=stablehlo, onnx")["formats"] == [
        "onnx",
        "torch",
        "stablehlo",
    ]


def test_a_report_is_of_one_run_or_of_several_and_other_modes_of_one(parse, run):
    several = parse("--mode=report", f"--workdir={run}", "--workdir=b", f"--workdir={run}", "--output=page.html")
    assert (several["run"], several["config"]["seed"], several["output"]) == (str(run), 7, "page.html")
    assert several["runs"] == [str(run), "b"]
    assert parse("--mode=evaluate", f"--workdir={run}")["run"] == str(run)
    refused = parse("--mode=report", f"--workdir={run}", "--workdir=b")["says"]
    assert refused == "a report of 2 runs is a page of none of them; name it: --output=FILE.html"
    refused = parse("--mode=evaluate", f"--workdir={run}", "--workdir=b")["says"]
    assert refused == "--workdir is given 2 times; of --mode=evaluate it names one run"


def test_the_workdir_is_that_of_the_recipe(parse):
    assert parse()["run"] == "runs/digits"
    assert parse("--config=configs/paper_cifar.py:learning=nal")["run"] == "runs/paper_cifar"
    assert parse("--config=paper_cifar:learning=nal")["run"] == "runs/paper_cifar"
    cluster = "--coordinator=localhost:12", "--num_processes=2", "--process_id=1"
    assert parse(*cluster)["cluster"] == ["localhost:12", 2, 1]
    assert parse()["cluster"] == [None, None, None]


def test_flags_may_lie_in_a_file(parse, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--config.batch_size=8\n--mode=show_data\n")
    found = parse(f"--flagfile={file}")
    assert (found["config"]["batch_size"], found["mode"]) == (8, "show_data")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise SystemError('a' * 500 + '\\n\\nb')", "does not load: SystemError: aaa"),
        ("import no_such_module", "does not load: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(): pass", "the config has no config.seed"),
        ("def get_config(): return [1]", "does not load: AttributeError"),
        ("def get_config():\n c = default.get_config()\n c.batch_sise = 3\n return c", "there is no config.batch_sise"),
        ("def get_config():\n c = default.get_config()\n del c.data\n return c", "the config has no config.data.name"),
        ("def get_config():\n c = default.get_config()\n c.seed = 'x'\n return c", "does not load: TypeError"),
        ("def get_config():\n c = default.get_config()\n c.ema_decay = 2.0\n return c", "config.ema_decay is 2.0; it"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_none_is_told(parse, tmp_path, text, says):
    (tmp_path / "recipe").write_text(f"from configs import default\n{text}")
    assert says in parse(f"--config={tmp_path}/recipe", "--config.total_steps=5", "--config.batch_size=2")["says"]


def test_a_workdir_without_a_recipe_uses_the_runs(parse, run):
    assert parse(f"--workdir={run}")["config"]["seed"] == 7
    assert parse(f"--workdir={run}", "--config.total_epochs=50")["config"]["total_epochs"] == 50
    assert parse(f"--workdir={run}", "--config=configs/digits.py")["config"]["seed"] == 0  # which training then refuses
    says = parse(f"--workdir={run}", "--config.seed=8")["says"]
    assert says.startswith(f"{run} holds another config's run: config.seed is 7 there and 8 now; ")
    assert "config.total_epochs is 0.0" in parse(f"--workdir={run}", "--config.total_epochs=0")["says"]
    assert "not be longer than the run" in parse(f"--workdir={run}", "--config.total_epochs=1")["says"]


@pytest.mark.parametrize("mode", [["--mode=evaluate"], ["--mode=export", "--output=x"]])
def test_a_trained_net_keeps_its_recipe_and_is_measured_as_asked(parse, run, mode):
    line = [*mode, f"--workdir={run}"]
    found = parse(*line, "--config.eval.views=2", "--config.eval.batch_size=8", "--config.data.eval_split=train[:5%]")
    assert [found["config"][key] for key in ("seed", "eval.views", "eval.batch_size")] == [7, 2, 8]
    assert parse(*line, "--config=configs/digits.py")["config"]["seed"] == 7
    for key, value in {"model.learning": "nal", "data.mean": "0.5", "seed": "8", "optimizer.momentum": "0.5"}.items():
        assert f"holds another config's run: config.{key} is " in parse(*line, f"--config.{key}={value}")["says"]
    says = parse(*line, "--config=configs/cifar10_ra92.py")["says"]
    assert "another config's run: config.model.name is 'ra_tiny' there and 'ra92_cifar' now" in says
    assert "config.eval.views is '3'; it must be one of 1, 2, 10" in parse(*line, "--config.eval.views=3")["says"]


@pytest.mark.parametrize("key", ["batch_size", "eval.batch_size", "data.mean", "model.name", "seed", "new"])
@pytest.mark.parametrize(
    "value", ["NaN", "[]", '{"a": [1]}', '"x\\ny"', "1e400", "9" * 400, "null", '"' + "x" * 900 + '"']
)
def test_a_runs_config_that_was_changed_by_hand_is_checked(parse, run, key, value):
    config = json.loads(run.config.to_json())
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = "VALUE"
    run.write("config.json", json.dumps(config).replace('"VALUE"', value))
    for mode in [], ["--mode=evaluate"], ["--mode=export", "--output=x"]:
        assert key.rpartition(".")[2] in parse(*mode, f"--workdir={run}")["says"]


TEXTS = [
    "", " ", "(", ")", "[", "nan", "inf", "-inf", "None", "none", "True", "1e400", "-1e400", "²", "٣", "0", "1", "-1",
    "3.5", "1e3", "0x10", "1_0", "1" * 30, "9" * 5000, "x" * 10_000, "é" * 500, "\u202eabc", "\x1b[31mred", "a\nb",
    "\t", "\\d", "$(rm -rf /)", "`id`", "../../x", "~", "~/x", "~root/x", "*", "%s%n", "{}", "{0}", "()", "(1,)",
    "('a', 'b')", "(1, 2, 3)", "((1,),)", "[1, [2]]", "1,2", "30%", "200%", "5", "5 epochs", "500 steps", "-3 steps",
    "1e999 steps", "10**30", "digits", "folder:", "train", "train[:90%]", "newest", "--config.seed=3", "-", "--", "=",
    "a=b", "\udcff", "localhost:1234", "configs/digits.py", "configs/paper_cifar.py:learning=", "null", "()" * 300,
]  # fmt: skip
OTHER = ["config", "workdir", "checkpoint", "torch_checkpoint", "output", "coordinator", "num_processes", "process_id"]
OTHER += ["images", "top", "summary", "format"]
MODES = ["train", "evaluate", "predict", "attention", "prepare", "show_data", "import", "export", "Train", ""]


def random_line(rng):
    """One to five arguments, each with one of the texts."""

    def argument():
        kind, text = rng.random(), rng.choice(TEXTS)
        if kind < 0.6:
            flag = f"config.{rng.choice(list(RULES))}"
        elif kind < 0.85:
            flag = rng.choice(OTHER)
        elif kind < 0.9:
            return f"--mode={rng.choice(MODES)}"
        else:
            flag = rng.choice(
                ["config.", "config.model", f"config.{text}", text, "noconfig.seed", "verbosity", "v", "nov"]
            )
        return rng.choice([f"--{flag}={text}"] * 6 + [f"--{flag}", f"-{flag}={text}", f"--no{flag}", text])

    return [argument() for _ in range(rng.randint(1, 5))]


@pytest.mark.parametrize("seed", range(10))
def test_no_command_line_ends_in_anything_but_a_config_or_one_line(parse, seed):
    """The fixture looks at every answer: its kind, its length, its time, and what was imported."""
    rng = random.Random(seed)
    refused = sum("error" in parse(*random_line(rng)) for _ in range(60))
    assert refused > 30
    for key in rng.sample(list(RULES), 20):
        found = parse(f"--config.{key}={(text := rng.choice(TEXTS))}")
        named = f"config.{key} ", "exactly one", "the run, which has"  # of a total, a warm-up may be what does not fit
        assert "error" not in found or any(name in found["says"] for name in named), (key, text)


def test_a_refusal_from_another_folder_is_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "--config=configs/cifar10_ra92.py", "--config.data.mean=\\d"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config.data.mean is ('\\\\d',); write 1 to 4 numbers, from 0 to 1, such as (0.5,)\n"
    assert not list(tmp_path.iterdir())
