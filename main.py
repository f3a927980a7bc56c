"""Train and evaluate Residual Attention Networks.

python main.py --config=FILE [--mode=train|evaluate|show_data|…] [--workdir=DIR] [--config.key=value ...]
"""

import os
import pathlib
import re
import sys
import time

import ml_collections
from absl import app, flags
from ml_collections.config_flags import config_flags

from resattn_jax.config import flatten, nearest, resolve_total
from resattn_jax.errors import Interrupted, RunError, UsageError

BEGAN = time.perf_counter()  # all that takes long to import is imported later

DEFAULT_CONFIG = "configs/digits.py"
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, f"The recipe; override a value with --config.key=value. Default: {DEFAULT_CONFIG}."
)
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "prepare", "show_data", "import", "export"],
    "train: start a run, or go on with it; evaluate: measure a checkpoint; prepare: download the data set; show_data:"
    " draw a training batch as the net sees it; import and export: a checkpoint from and to --torch_checkpoint.",
)
flags.DEFINE_string("workdir", None, "Where the run lies. Default: runs/NAME for configs/NAME.py.")
flags.DEFINE_string("checkpoint", "newest", "Which one to evaluate or export: newest, best (by top-1), or a step.")
flags.DEFINE_string("torch_checkpoint", None, "PyTorch state dict: .pkl, .pth, .pt or .safetensors.")
flags.DEFINE_string("coordinator", None, "Many hosts, if they are not found by themselves: HOST:PORT of the first.")
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")


def main(argv: list[str]) -> None:
    """Does what the command line says. Raises UsageError, RunError and Interrupted."""
    config, workdir = parse(argv)
    if FLAGS.mode == "prepare":
        from resattn_jax.data.sources import prepare

        print(f"{config.data.name} lies in {prepare(config.data.name, config.data.dir)}")
        return

    from resattn_jax import runtime  # JAX and what builds on it take seconds to import: only when they are needed

    runtime.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.mode == "train":
        from resattn_jax.train import train_and_evaluate

        train_and_evaluate(config, workdir, began=BEGAN)
    elif FLAGS.mode == "evaluate":
        from resattn_jax.evaluate import evaluate_checkpoint
        from resattn_jax.report import print_evaluation

        print_evaluation(evaluate_checkpoint(config, workdir, FLAGS.checkpoint))
    elif FLAGS.mode == "show_data":
        from resattn_jax.contact_sheet import write_contact_sheet

        print(f"a training batch as the net sees it: {write_contact_sheet(config, workdir)}")
    else:
        from resattn_jax.transfer import export_torch, import_torch

        if FLAGS.torch_checkpoint is None:
            raise UsageError(f"--mode={FLAGS.mode} needs --torch_checkpoint=FILE")
        if FLAGS.mode == "import":
            print(import_torch(config, workdir, FLAGS.torch_checkpoint))
        else:
            print(export_torch(config, workdir, FLAGS.checkpoint, FLAGS.torch_checkpoint))


def use_large_pages() -> None:
    """Starts the program again, once, with a C library that asks the system for pages of 2 MB where it asks for much.

    On the CPU the temporaries of a step are one piece of memory, 2.5 GB for ra92_cifar and 64 images, mapped anew for
    every step; in pages of 4 kB that alone takes a fifth of it. glibc reads the setting when a process starts, other C
    libraries pass it over, and one that is set already is left alone.
    """
    if sys.platform == "linux" and not LARGE_PAGES.keys() & os.environ.keys():
        os.environ.update(LARGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """The config and the workdir the command line asks for. Raises UsageError for whatever it cannot mean."""
    app.define_help_flags()
    pairs = zip(argv, [*argv[1:], ""], strict=True)  # --config=FILE or --config FILE
    named = [a.partition("=")[2] or after for a, after in pairs if re.match(r"--?config(=|$)", a)]
    if not named:  # ml_collections reads sys.argv, and would parse a default before anything could catch its errors
        argv[1:1] = [f"--config={DEFAULT_CONFIG}"]
    path = named[-1] if named else DEFAULT_CONFIG
    file = pathlib.Path(path.partition(":")[0])
    if not file.is_file():
        there = [str(f) for f in sorted(pathlib.Path("configs").glob("*.py")) if f.stem not in ("__init__", "default")]
        raise UsageError(f"there is no config {str(file)!r}{nearest(str(file), there)}; there are {', '.join(there)}")
    try:
        rest = FLAGS(argv)[1:]
        config = FLAGS.config
    except Exception as error:  # absl and ml_collections raise many kinds, for keys, values and types
        raise UsageError(_explain(argv, path, error)) from error
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; a flag is written --flag=value")
    if "://" in (FLAGS.workdir or ""):
        raise UsageError(f"--workdir={FLAGS.workdir} is no path; mount the bucket and name that folder")
    resolve_total(config, config_flags.get_override_values(FLAGS["config"]))
    return config, pathlib.Path(FLAGS.workdir or f"runs/{file.stem}")


def _explain(argv: list[str], path: str, error: Exception) -> str:
    """What is wrong with the command line, in one line: an unknown key, with the nearest right one, or the error."""
    try:
        keys = flatten(config_flags.ConfigFileFlagParser("config").parse(path))
    except Exception as config_error:
        return f"the config {path} does not load: {str(config_error).strip().splitlines()[-1]}"
    for argument in argv[1:]:
        flag = argument.partition("=")[0].lstrip("-")
        if flag.startswith("config.") and flag.removeprefix("config.") not in keys:
            return f"there is no {flag}{nearest(flag, [f'config.{key}' for key in keys])}"
    return str(error).strip().splitlines()[0]


def _exit(message: object, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    use_large_pages()
    try:
        main(sys.argv)
    except UsageError as error:
        _exit(f"error: {error}", 2)
    except RunError as error:
        _exit(f"error: {error}", 1)
    except Interrupted as stop:
        _exit(stop, 128 + stop.signal)
