"""What setup.py and CITATION.cff say of the package is so."""

import os
import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

import resattn_jax


def setup(*arguments, folder=ROOT, **environment):
    """What setup.py prints at the end."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_setup_reads_its_files_in_any_locale():
    version = setup("--version", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert version == resattn_jax.__version__


def test_every_folder_with_modules_is_a_package():
    """setup.py finds packages by their __init__.py."""
    modules = (ROOT / "resattn_jax").rglob("*.py")
    assert {path.parent.name for path in modules if not (path.parent / "__init__.py").exists()} == set()
    assert (ROOT / "resattn_jax/py.typed").exists()


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == resattn_jax.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the names in the sdist, below its folder; {name: size} of what is in the wheel built from it)."""
    folder = tmp_path_factory.mktemp("built")
    setup("egg_info", f"--egg-base={folder}", "sdist", f"--dist-dir={folder}")
    [archive] = folder.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    setup("bdist_wheel", f"--dist-dir={folder}", folder=unpacked)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        sizes = {entry.filename: entry.file_size for entry in file.filelist}
    return {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}, sizes


def test_the_sdist_has_what_a_reader_and_a_tester_need(built):
    names, _ = built
    wanted = "README.md LICENSE CHANGELOG.md CITATION.cff main.py constraints.txt configs/digits.py docs/data.md"
    assert {*wanted.split(), "tests/conftest.py", "tests/data/run_dd52f1e.tar.gz"} <= names


def test_the_wheel_has_the_package_whole_and_nothing_else(built):
    """Every file of resattn_jax/, recipes and weights too; no tests, no benchmarks, no top-level configs."""
    _, sizes = built
    tops = {name.partition("/")[0] for name in sizes}
    assert tops == {"resattn_jax", f"resattn_jax-{resattn_jax.__version__}.dist-info"}
    of_the_package = {
        str(path.relative_to(ROOT))
        for folder in (ROOT / "resattn_jax", ROOT / "resattn_jax/configs")  # rglob follows no links
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in sizes if name.startswith("resattn_jax/")} == of_the_package
    assert {"resattn_jax/py.typed", "resattn_jax/configs/digits.py", "resattn_jax/configs/default.py"} <= sizes.keys()
    large = {name: size for name, size in sizes.items() if size > 50_000 and not name.endswith("/model.safetensors")}
    assert large == {}
    assert sum(sizes.values()) < 5_000_000
