"""What imports what: heavy libraries only where they are used, and the package's own modules from top to bottom."""

import ast
import fnmatch
import graphlib
import json
import subprocess
import sys

import pytest
from helpers import ROOT

# ---- Heavy libraries, each time in a fresh interpreter.

HOST_MODULES = [
    *(f"resattn_jax.data.{name}" for name in ("spec", "pictures", "transforms", "batches", "order")),
    *(f"resattn_jax.data.{name}" for name in ("randaugment", "label_noise", "sources")),
    *(f"resattn_jax.data.sources.{path.stem}" for path in (ROOT / "resattn_jax/data/sources").glob("[!_]*.py")),
]


def loaded_by(program, *libraries):
    """Those of the libraries that a program has loaded when it ends."""
    program += f"\nimport json, sys\nprint(json.dumps([x for x in {libraries!r} if x in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
    assert loaded_by("import resattn_jax", "jax", "tensorflow") == []


def test_parsing_a_command_line_imports_neither_jax_nor_tensorflow_nor_tfds():
    program = "import main, resattn_jax.cli as cli; cli.parse(['main.py', '--config=configs/cifar10_ra92.py'])"
    assert loaded_by(program, "jax", "tensorflow", "tensorflow_datasets") == []


def test_what_draws_is_imported_by_the_modes_that_draw_alone():
    modes = ", ".join(f"resattn_jax.modes.{mode}" for mode in ("train", "evaluate", "predict"))
    assert loaded_by(f"import {modes}", "matplotlib", "jinja2") == []
    drawing = "import resattn_jax.modes.attention, resattn_jax.modes.report"
    assert loaded_by(drawing, "matplotlib", "matplotlib.pyplot") == ["matplotlib"]


def test_training_imports_neither_pytorch_nor_scikit_learn_nor_a_client_of_buckets():
    """tensorboardX would import the first and the last where they are installed; digits come without the second.

    Orbax comes with the first checkpoint, when the step is being compiled.
    """
    program = "import resattn_jax.modes.train as t; t.TrainingData(__import__('configs.digits').digits.get_config())"
    others = "torch", "sklearn", "google.cloud.storage", "tensorflow_datasets", "matplotlib", "orbax"
    assert loaded_by(program, *others) == []


def test_what_data_workers_import_imports_no_jax():
    assert len(HOST_MODULES) >= 13
    assert loaded_by(f"import {', '.join(HOST_MODULES)}", "jax") == []


# ---- The package's own modules.

# From top to bottom. A module imports from its own layer and from those below.
LAYERS = [
    ["main"],
    ["__main__"],
    ["modes", "modes.*"],
    ["classifier", "trained", "export.*", "on_board", "fine_tune", "mask_statistics", "mistakes", "report", "report.*"],
    ["experiment", "ahead"],
    ["train_step", "intermediates", "checkpoint", "optimizer"],
    ["augment", "trivial_augment", "packed", "state", "metrics", "run", "cli", "checksums", "export"],
    ["data", "data.*"],
    ["convert", "naming", "naming.*", "torch_files", "mxnet_files"],
    ["models", "models.*", "config", "rules", "runtime", "buckets", "watchdog", "profiler"],
    ["signals", "errors"],
]


def modules():
    """{name without "resattn_jax.": file} of all modules but resattn_jax/__init__.py, which is only a face."""
    files = [path for path in (ROOT / "resattn_jax").rglob("*.py") if path != ROOT / "resattn_jax/__init__.py"]
    parts = {path: path.relative_to(ROOT / "resattn_jax").with_suffix("").parts for path in files}
    names = {".".join(part for part in parts[path] if part != "__init__"): path for path in files}
    return {"main": ROOT / "main.py", **names}


def imported(node):
    """The dotted names that a module imports, at its head or in a function; those for type checkers are left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not read here"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in children:
        yield from imported(child)


def arrows(known):
    """(importer, imported) of all pairs of `known`, {name: file}."""
    found = set()
    for name, path in known.items():
        for target in imported(ast.parse(path.read_text(encoding="utf-8"))):
            target = target.removeprefix("resattn_jax.")
            target = target if target in known else target.rpartition(".")[0]  # a name in the module
            if target in known and target != name:
                found.add((name, target))
    return found


def layer_of(name):
    """The number of a module's layer, from the top."""
    found = [i for i, patterns in enumerate(LAYERS) if any(fnmatch.fnmatch(name, p) for p in patterns)]
    assert len(found) == 1, f"{name} is in {len(found)} of LAYERS"
    return found[0]


@pytest.fixture(scope="module")
def known():
    return modules()


def test_imports_are_found_at_the_head_and_in_functions():
    program = """
import resattn_jax.a
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import resattn_jax.b
else:
    from resattn_jax import c
def f():
    from resattn_jax.d import x
"""
    assert set(imported(ast.parse(program))) == {
        "resattn_jax.a", "typing.TYPE_CHECKING", "resattn_jax.c", "resattn_jax.d.x"
    }  # fmt: skip


def test_every_pattern_of_the_layers_is_of_a_module(known):
    assert [p for patterns in LAYERS for p in patterns if not fnmatch.filter(known, p)] == []


def test_no_import_points_upward(known):
    assert sorted((a, b) for a, b in arrows(known) if layer_of(a) > layer_of(b)) == []


def test_no_imports_go_in_a_circle(known):
    found = arrows(known)
    graph = {name: {b for a, b in found if a == name} for name in known}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_models_import_nothing_of_the_rest_and_data_nothing_of_models(known):
    found = arrows(known)
    assert [(a, b) for a, b in found if a.startswith("models") and not b.startswith("models")] == []
    assert [(a, b) for a, b in found if a.startswith("data") and b.startswith("models")] == []
