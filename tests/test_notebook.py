"""The notebook runs from its first cell to its last, in a kernel of its own, as a reader runs it."""

import os

import pytest
from helpers import ROOT


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(ROOT / "notebooks/attention.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # large, and soon untrue
    [epochs] = [cell for cell in notebook.cells if cell.source.startswith("EPOCHS = ")]
    epochs.source = "EPOCHS = 1"
    [train] = [cell for cell in notebook.cells if cell.source.startswith("def train")]
    small = "config.model.update(learning=learning, p=0, t=0, r=0, last=0)"
    train.source = train.source.replace("config.model.learning = learning", small)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(drawn) == 4
    assert (tmp_path / "exported/model.safetensors").exists()
