"""Tests that all cells of every notebook run."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(pathlib.Path("notebooks").glob("*.ipynb"))
SLOW = ("02_pretrained",)
# What is put in the place of a notebook's cell of parameters, so that it runs in seconds.
SHORTER = {"03_rewards": "NUM_IMAGES, SFT_UPDATES, RL_UPDATES = 320, 2, 2"}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SHORTER[path.stem]
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}})
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
