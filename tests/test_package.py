"""What setup.py and CITATION.cff say of the package is so."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import resattn_jax


def setup(*arguments, **environment):
    """What setup.py prints at the end."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
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


def test_the_package_has_its_templates(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    here = {path.name for path in (ROOT / "resattn_jax/report/templates").iterdir()}
    assert {path.name for path in (tmp_path / "resattn_jax/report/templates").iterdir()} == here != set()
