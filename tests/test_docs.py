"""Every command and every Python block of README.md and docs/ does what it says, as far as it can be done here.

Commands run in this process, cut short to two steps of a small net. All pages share a folder, so that a run is
trained once; the Python blocks of a page share their names. What comes after `<!-- needs: … -->` needs what is not
here, hardware, a download or minutes: its command lines are read and not run.
"""

import json
import re
import shlex
import subprocess
import sys

import jax
import markdown_it
import numpy as np
import PIL.Image
import pytest
from absl import flags
from helpers import ROOT, photograph

from resattn_jax import cli, runtime
from resattn_jax.__main__ import main
from resattn_jax.configs import digits
from resattn_jax.errors import UsageError
from resattn_jax.models.nets import NETS, Spec, Stage, Stem

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["--config.total_steps=2", "--config.schedule.warmup=0 steps", "--config.model.name=ra56_cifar_slim"]
STAGES = (Stage(8, modules=1, depth=1, stride=2), Stage(16, modules=0, depth=0, stride=1))
MICRO = Spec(stem=Stem(8, 3), stages=STAGES, p=0, t=0, last=0)  # goes by that name
PICTURES = ["--config.data.image_size=16", "--config.batch_size=4", "--config.eval.batch_size=4"]

# Stands for every program: writes down how it was called.
RECORDER = f"""#!{sys.executable} -IS
import json, sys
with open({{calls!r}}, "a") as file:
    print(json.dumps([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]), file=file)
"""
PROGRAMS = ["resattn_jax", "python", "python3", "pip", "make", "gcloud", "srun", "tfds"]


def blocks(text):
    """(language, text, whether it needs what is not here) of each block of commands or Python."""
    before = None
    for token in markdown_it.MarkdownIt().parse(text):
        if token.type in ("fence", "code_block"):
            language = token.info or ("bash" if token.type == "code_block" else "")
            if language in ("bash", "python"):
                yield language, token.content, before is not None and before.startswith("<!-- needs: ")
        before = token.content if token.type == "html_block" else None


@pytest.fixture
def folder(tmp_path):
    """Where the reader is: with a digit, photographs, and a program of each name that only takes notes."""
    folder = tmp_path / "reader"
    folder.mkdir()
    PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "digit.png")
    photograph(300, 260).save(folder / "picture.png")
    for kind in "cats", "dogs":
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(4):
            photograph(40 + i, 50).save(folder / "photos" / kind / f"{i}.jpg")
    for where in "programs", "convert/bin":
        (folder / where).mkdir(parents=True)
        for name in PROGRAMS:
            (folder / where / name).write_text(RECORDER.format(calls=str(folder / "calls")))
            (folder / where / name).chmod(0o755)
    (folder / "resattn_jax").mkdir()  # the repository, seen from a TPU's host
    return folder


def calls(script, folder):
    """The programs that a shell calls for a script, with their arguments; also on the hosts that gcloud calls."""
    (folder / "calls").write_text("")
    path = f"{folder / 'programs'}:/usr/bin:/bin"
    subprocess.run(["bash", "-e", "-c", script], cwd=folder, env={"PATH": path, "BUCKET": "bucket"}, check=True)
    called = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    remote = [argument.removeprefix("--command=") for call in called for argument in call if "--command=" in argument]
    return called + [call for inner in remote for call in calls(inner, folder)]


def arguments_of_ours(call):
    """Those of resattn_jax, python main.py or python -m resattn_jax, by whatever started; None for another program."""
    for ours in (["resattn_jax"], ["python", "main.py"], ["python", "-m", "resattn_jax"]):
        for at in range(len(call)):
            if call[at : at + len(ours)] == ours:
                return call[at + len(ours) :]
    return None


def follow(call, needs):
    """Does what a reader asks a program for, or reads it."""
    for flag in flags.FLAGS:
        flags.FLAGS[flag].unparse()
    arguments = arguments_of_ours(call)
    if arguments is not None:
        command = cli.parse(["resattn_jax", *arguments])
        if not needs:
            for flag in flags.FLAGS:
                flags.FLAGS[flag].unparse()
            short = SHORT if command.mode in ("train", "show_data") else []
            pictures = PICTURES if short and command.config.data.name.startswith("folder:") else []
            main(["resattn_jax", *arguments, *short, *pictures])
    elif call[0] == "make":
        assert re.search(rf"^{call[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif call[0] == "pip" and call[1] == "install":
        wanted = re.findall(r"[\w-]+", "".join(re.findall(r"\.\[(.*)\]", shlex.join(call))))
        assert all(f'"{extra}": ' in (ROOT / "setup.py").read_text() for extra in wanted)
    elif call[1:2] == ["-m"] and call[2].startswith("benchmarks."):
        source = (ROOT / f"{call[2].replace('.', '/')}.py").read_text()
        assert all(argument.split("=")[0].lstrip("-") in source for argument in call[3:] if argument.startswith("--"))
    else:
        assert needs, f"the test knows nothing of {shlex.join(call)}"


def small(config):
    """For runs that Python blocks start."""
    config.model.name = "ra56_cifar_slim"
    return config


@pytest.mark.usefixtures("shared_programs")
def test_every_page_does_what_it_says(folder, monkeypatch):
    """One test, so that no process trains what another has trained already; README.md comes first, and trains most."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runtime, "initialize", lambda *_: None)  # JAX is in use already
    monkeypatch.setitem(NETS, "ra56_cifar_slim", MICRO)
    monkeypatch.setattr(digits, "get_config", lambda get=digits.get_config: small(get()))
    monkeypatch.setattr(jax, "devices", lambda devices=jax.devices(): devices[:1])  # one compiles faster than eight
    for page in PAGES:
        namespace = {}
        for language, text, needs in blocks(page.read_text(encoding="utf-8")):
            print(f"{page.name}:\n{text}")
            if language == "bash":
                for call in calls(text, folder):
                    follow(call, needs)
                continue
            if file := re.match(r"# (\w+\.py)\n", text):
                (folder / file[1]).write_text(text)
            code = compile(text, page.name, "exec")
            if not needs:
                exec(code, namespace)


@pytest.mark.parametrize(
    "script",
    [
        "resattn_jax --config=digit",
        "python main.py --config=configs/digits.py --mode=evaluat",
        "gcloud compute ssh --command='cd resattn_jax && python main.py --config.batch_sise=3'",
        "pip install -e '.[gpu]'",
        "make tests",
        "python -m benchmarks.input --dta=x",
        "tensorboard --logdir=runs",
    ],
)
def test_what_is_wrong_is_noticed(script, folder):
    try:
        for call in calls(script, folder):
            follow(call, needs="gcloud" in script)
    except (UsageError, AssertionError, subprocess.CalledProcessError):
        return
    pytest.fail("it was not")


def test_blocks_are_found():
    text = "a\n\n    make x\n\n<!-- needs: y -->\n\n    make z\n\n```python\n1\n```\n\n```text\nno\n```\n"
    assert list(blocks(text)) == [("bash", "make x\n", False), ("bash", "make z\n", True), ("python", "1\n", False)]
