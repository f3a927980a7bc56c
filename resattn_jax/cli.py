"""The command line: flags, which mode each belongs to, and what is wrong with it in one line.

Nothing here imports JAX, so that a mistake is told at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import runpy
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import app, flags

from resattn_jax import buckets
from resattn_jax.config import OF_THE_NET, changed, check, check_keys, check_values, compare, no_such_key, resolve_total
from resattn_jax.errors import UsageError, nearest, reason
from resattn_jax.export import FILES
from resattn_jax.rules import RULES, shortened, shown
from resattn_jax.run import Run

BEGAN = time.perf_counter()

RECIPES = pathlib.Path(__file__).parent / "configs"  # in the repository a link to configs/
DEFAULT_CONFIG = "digits"
_MOST = 1 << 20  # processes


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode, whose code is `run(command)` in the module of its name under modes/.

    flags: those that are its own. needs: those of which one has to be given, and no more. files: those that name a
    file; other paths are folders. of_a_run: model, data and recipe are those of the run in the workdir.
    """

    what: str
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ("torch_checkpoint",)
    of_a_run: bool = False


_DEVICES = ("workdir", "coordinator", "num_processes", "process_id")

MODES = {
    "train": Mode("start a run, or go on with it", (*_DEVICES, "profile", "profiler_port")),
    "evaluate": Mode("measure a checkpoint", (*_DEVICES, "checkpoint"), of_a_run=True),
    "prepare": Mode("download the data set"),
    "show_data": Mode("draw a training batch as the net sees it", _DEVICES),
    "predict": Mode(
        "label pictures, --images, with a checkpoint",
        ("workdir", "checkpoint", "images", "top", "output"),
        needs=("images",),
        files=("output",),
        of_a_run=True,
    ),
    "attention": Mode(
        "draw what the attention modules do to pictures, --images, or measure it over the evaluation split, --summary",
        ("workdir", "checkpoint", "images", "summary", "output"),
        needs=("images", "summary"),
        of_a_run=True,
    ),
    "report": Mode(
        "write a page of a run, or of several beside each other: --workdir for each",
        ("workdir", "output"),
        files=("output",),
        of_a_run=True,
    ),
    "import": Mode(
        "make a run of the PyTorch checkpoint --torch_checkpoint",
        (*_DEVICES, "torch_checkpoint"),
        needs=("torch_checkpoint",),
    ),
    "export": Mode(
        "write a checkpoint to --output, or for PyTorch alone to --torch_checkpoint",
        (*_DEVICES, "checkpoint", "output", "format", "torch_checkpoint"),
        needs=("output", "torch_checkpoint"),
        of_a_run=True,
    ),
}

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "config",
    None,
    f"The recipe, a file or a name on board; override a value with --config.key=value. Default: the run's, or "
    f"{DEFAULT_CONFIG}.",
)
flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{name}: {mode.what}" for name, mode in MODES.items()) + ".")
flags.DEFINE_multi_string(
    "workdir",
    None,
    "Where the run lies: a folder or gs://BUCKET/FOLDER. Default: runs/NAME for the recipe NAME. Of report it may be"
    " given several times.",
)
flags.DEFINE_string("checkpoint", "newest", "Which one to measure, use or export: newest, best (by top-1), or a step.")
flags.DEFINE_string("torch_checkpoint", None, "PyTorch state dict: .pkl, .pth, .pt or .safetensors.")
flags.DEFINE_string(
    "output",
    None,
    "What is written: of export the folder or gs://BUCKET/FOLDER, which `resattn_jax.load` opens; of attention the"
    " folder of the page, by default WORKDIR/attention; of report the page, for one run by default WORKDIR/report.html;"
    " of predict the file, .csv, .jsonl or .parquet.",
)
flags.DEFINE_multi_string(
    "images",
    [],
    "Pictures: a file, a folder, a pattern such as 'DIR/**/*.jpg', or for attention eval:0,5,17, rows of the evaluation"
    " split. May be given several times.",
)
flags.DEFINE_integer("top", 5, "How many classes are told of each picture.", 1, _MOST)
flags.DEFINE_boolean("summary", False, "Of attention: measure the modules over the evaluation split.")
flags.DEFINE_multi_string(
    "format", [], f"What else an export writes to --output, one or more of: {', '.join(FILES)}; the first always is."
)
flags.DEFINE_string("coordinator", None, "Many hosts, if they are not found by themselves: HOST:PORT of the first.")
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.", 1, _MOST)
flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.", 0, _MOST)
flags.DEFINE_string(
    "profile",
    None,
    "START:COUNT: the COUNT steps after the first START are traced, into WORKDIR/plugins/profile, for TensorBoard's"
    " profile tab and for XProf. Of many hosts every one is given it, and writes its own trace.",
)
flags.DEFINE_integer(
    "profiler_port", None, "TensorBoard and XProf can take a trace of the run through this port.", 1, 65535
)

_OF_MODES = sorted({flag for mode in MODES.values() for flag in mode.flags})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What a command line asks for.

    config: for training the whole config; for a mode that measures or takes away a net, the run's with what the
    command line changes. runs: those of a report, of which `run` is the first; else that one. checkpoint: "newest",
    "best" or a step. images: as they were given. top: how many classes of each. formats: what is written to `output`.
    cluster: the arguments of `runtime.initialize`. profile: (START, COUNT), the steps to trace, or None. began:
    `time.perf_counter()` when the program started.
    """

    mode: str
    config: ml_collections.ConfigDict
    run: Run
    runs: tuple[Run, ...]
    checkpoint: str
    torch_checkpoint: str | None
    output: str | None
    images: tuple[str, ...]
    top: int
    summary: bool
    formats: tuple[str, ...]
    cluster: tuple[str | None, int | None, int | None]
    profile: tuple[int, int] | None
    profiler_port: int | None
    began: float


def parse(argv: Sequence[str]) -> Command:
    """What the command line asks for. Raises UsageError for whatever it cannot mean."""
    named, given = _parse_flags(argv)
    mode = MODES[FLAGS.mode]
    for flag in _OF_MODES:
        if FLAGS[flag].present and flag not in mode.flags:
            theirs = " and ".join(f"--mode={name}" for name, mode in MODES.items() if flag in mode.flags)
            raise UsageError(f"--{flag} is for {theirs}, not for --mode={FLAGS.mode}")
    if mode.needs and sum(map(_given, mode.needs)) != 1:
        wanted = " or ".join(f"--{flag}" + "=PATH" * (not FLAGS[flag].boolean) for flag in mode.needs)
        raise UsageError(f"--mode={FLAGS.mode} needs {wanted}{', one of them' * (len(mode.needs) > 1)}")
    if not re.fullmatch(r"newest|best|\d{1,10}", FLAGS.checkpoint, re.ASCII):
        raise UsageError(f"--checkpoint={shortened(FLAGS.checkpoint)}: it must be newest, best or the number of a step")
    config = _recipe(DEFAULT_CONFIG if named is None else named, given)
    default = f"runs/{pathlib.Path((named or DEFAULT_CONFIG).partition(':')[0]).stem}"
    run, *others = runs = [Run(path) for path in _workdirs() or [default]]
    if others and FLAGS.mode != "report":
        raise UsageError(f"--workdir is given {len(runs)} times; of --mode={FLAGS.mode} it names one run")
    if others and FLAGS.output is None:
        raise UsageError(f"a report of {len(runs)} runs is a page of none of them; name it: --output=FILE.html")
    return Command(
        mode=FLAGS.mode,
        config=_effective(run, config, given, named=named is not None),
        run=run,
        runs=tuple(runs),
        checkpoint=FLAGS.checkpoint,
        torch_checkpoint=_path("torch_checkpoint"),
        output=_path("output"),
        images=tuple(FLAGS.images),
        top=FLAGS.top,
        summary=FLAGS.summary,
        formats=_formats(),
        cluster=_cluster(),
        profile=_profile(),
        profiler_port=FLAGS.profiler_port,
        began=BEGAN,
    )


def parse_config(argv: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of a command line that names no run: --config=FILE --config.key=value. Raises UsageError."""
    named, given = _parse_flags(argv)
    config = _recipe(DEFAULT_CONFIG if named is None else named, given)
    check(config)
    return config


def _effective(
    run: Run, config: ml_collections.ConfigDict, given: dict[str, Any], *, named: bool
) -> ml_collections.ConfigDict:
    """The config a mode works with. named: whether --config was given.

    Where there is a run, its config goes before the file's for every mode but training, and for training too unless
    the file is named; what is set by hand changes it as far as it may.
    """
    measuring = MODES[FLAGS.mode].of_a_run
    then = run.config if measuring or (FLAGS.mode == "train" and not named and FLAGS.workdir) else None
    if then is None:
        check(config)
        return config
    if not measuring:
        config = changed(then, given, ("always",), run)
        check(config)
        return config
    if named:  # the run's own recipe counts; the file's must be one of the same net
        compare(then, config, run, allowed=("always", "measuring"), only=OF_THE_NET)
    config = changed(then, given, ("always", "measuring"), run)
    check_values(config)
    return config


def _parse_flags(argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """(the recipe that --config names, or None, what --config.key=value sets); FLAGS then has the other flags."""
    app.define_help_flags()
    for flag in ("config", "mode", *_OF_MODES):
        FLAGS.register_key_flag_for_module(argv[0], FLAGS[flag])  # for --help
    try:
        named, given, others = _taken_apart(FLAGS.read_flags_from_files(argv[1:], force_gnu=False))
        left = FLAGS([argv[0], *others])[1:]
    except (flags.Error, ValueError) as error:
        raise UsageError(shortened(reason(error), 300)) from error
    if left:
        raise UsageError(f"unexpected argument {shown(left[0])}; a flag is written --flag=value")
    return named, given


def _taken_apart(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """(the recipe that --config names, or None, what --config.key=value sets, the arguments that are other flags).

    A value may be the next argument, but for True and False: --config.key and --noconfig.key. The last of two counts.
    """
    named, given, others = None, {}, []
    rest = iter(arguments)
    for argument in rest:
        match = re.fullmatch(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", argument, re.DOTALL)
        if not match:
            _check_known(argument)
            others.append(argument)
            continue
        no, key, value = match.groups()
        if key is not None and key not in RULES:
            raise no_such_key(key)
        switch = key is not None and RULES[key].choices == (True, False)
        if no and (value is not None or not switch):
            raise UsageError(f"{shortened(argument)}: it is written --config.KEY=VALUE")
        if value is None:
            value = str(not no) if switch else next(rest, None)
        if value is None:
            raise UsageError(f"{argument} has no value; it is written {argument}=VALUE")
        if key is None:
            named = value
        else:
            given[key] = RULES[key].parse(key, value)
    return named, given, others


def _check_known(argument: str) -> None:
    flag = argument.lstrip("-").partition("=")[0]
    if argument.startswith("-") and flag and flag not in FLAGS and flag.removeprefix("no") not in FLAGS:
        raise UsageError(f"there is no flag --{shortened(flag)}{nearest(f'--{flag}', [f'--{f}' for f in FLAGS])}")


def _recipe(path: str, given: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config of a recipe with what is set by hand. Raises UsageError.

    path: FILE or FILE:VARIANT, or the name of a recipe on board where there is no such file.
    """
    name, *variant = path.split(":", 1)
    file = os.path.expanduser(name)
    if not os.path.isfile(file):
        there = {f.stem: str(f) for f in sorted(RECIPES.glob("*.py")) if f.stem not in ("__init__", "default")}
        on_board = there | {f"configs/{stem}.py": file for stem, file in there.items()}  # as the repository has them
        if name not in on_board:
            near = nearest(name, on_board)
            raise UsageError(f"there is no config {shown(name)}{near}; on board are {', '.join(there)}")
        file = on_board[name]
    if importlib.util.find_spec("configs") is None:
        sys.modules["configs"] = importlib.import_module("resattn_jax.configs")  # as recipes outside of it may say
    try:
        config = ml_collections.ConfigDict(runpy.run_path(file)["get_config"](*variant))
    except (Exception, SystemExit) as error:  # whatever a recipe raises
        raise UsageError(
            f"the config {shown(path)} does not load: {type(error).__name__}: {shortened(reason(error), 200)}"
        ) from error
    check_keys(config)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(given)
    resolve_total(config, given)
    return config


def _given(flag: str) -> bool:
    """Whether a flag was given, and is no switch that is off."""
    return bool(FLAGS[flag].present and FLAGS[flag].value is not False)


def _workdirs() -> list[str]:
    """The paths that --workdir names, each once."""
    return list(dict.fromkeys(_checked_path("workdir", given) for given in FLAGS.workdir or ()))


def _path(flag: str) -> str | None:
    """The path that a flag names, None where it is not given. Raises UsageError for what can be none."""
    given = FLAGS[flag].value
    return None if given is None else _checked_path(flag, given)


def _checked_path(flag: str, given: str) -> str:
    """The path that a text names, `~` being the home folder. Raises UsageError for what can be none."""
    path, named = os.path.expanduser(given), f"--{flag}={shortened(given)}"
    if "://" in path:
        if flag == "torch_checkpoint":
            raise UsageError(f"{named} is no path; PyTorch's files are read and written on the local disk")
        return str(buckets.opened(path))
    if not path.strip() or path.startswith("~"):
        raise UsageError(f"{named} is no path; write one, in which ~ is your home folder")
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        raise UsageError(f"{named}: {getattr(error, 'strerror', error)}") from error
    if is_folder != (flag not in MODES[FLAGS.mode].files):
        raise UsageError(f"{named} is {'a folder; name a file' if is_folder else 'a file; name a folder'}")
    return path


def _formats() -> tuple[str, ...]:
    """The formats of --format, given once with commas or more often. Raises UsageError for what is none."""
    named = [name.strip() for given in FLAGS.format for name in given.split(",")]
    for name in named:
        if name not in FILES:
            near = nearest(name, FILES)
            raise UsageError(f"--format={shortened(name)}{near}: it must be one or more of {', '.join(FILES)}")
    if named and FLAGS.output is None:
        raise UsageError(f"--format={shortened(','.join(named))} needs --output=DIR, the folder it is written to")
    return tuple(dict.fromkeys(named))


def _profile() -> tuple[int, int] | None:
    """(START, COUNT) of --profile. Raises UsageError for what is written otherwise."""
    if FLAGS.profile is None:
        return None
    numbers = re.fullmatch(r"(\d{1,10}):0*([1-9]\d{0,9})", FLAGS.profile, re.ASCII)
    if not numbers:
        raise UsageError(
            f"--profile={shortened(FLAGS.profile)}: it is written START:COUNT, such as 100:5 for steps 101 to 105"
        )
    return int(numbers[1]), int(numbers[2])


def _cluster() -> tuple[str | None, int | None, int | None]:
    """--coordinator, --num_processes and --process_id. Raises UsageError where they do not go together."""
    address, count, process = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    if len({value is None for value in (address, count, process)}) == 2:
        raise UsageError("--coordinator, --num_processes and --process_id need each other")
    if address is None:
        return None, None, None
    port = re.fullmatch(r"\S+:(\d{1,5})", address, re.ASCII)
    if not port or not 0 < int(port[1]) < 65536:
        raise UsageError(f"--coordinator={shortened(address)}: it is written HOST:PORT")
    if process >= count:
        raise UsageError(f"--process_id={process}: it must be less than --num_processes, which is {count}")
    return address, count, process
