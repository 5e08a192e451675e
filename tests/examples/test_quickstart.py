"""The quickstart notebook runs from top to bottom, on a small model and dataset."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.project_clone import Clone

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path, tiny_model_dir):
    clone = Clone(tmp_path / "project", tiny_model_dir)
    # The environment of the tests, which make takes for its own, and up to date.
    environment = clone.folder / ".venv"
    environment.mkdir()
    for path in Path(sys.executable).parents[1].iterdir():
        if path.name != ".installed":
            (environment / path.name).symlink_to(path)
    (environment / ".installed").touch()
    return clone


def test_every_cell_runs_and_shows_results(clone, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = clone.folder / "examples"
    notebook = nbformat.read(folder / "quickstart.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(folder)}}, kernel_name="python3"
    )
    try:
        client.execute(env={**os.environ})
    finally:
        shown = [
            "".join(output.get("text", "") for output in cell.get("outputs", ()))
            for cell in notebook.cells
            if cell.cell_type == "code"
        ]
        print(*shown, sep="\n")  # pytest shows it if a cell fails
    _, pipeline, accuracies, _, answer, experiment, summary, table = shown
    assert "accuracy after: fine-tuned" in pipeline
    (ratio,) = re.findall(r"perplexity, 8-bit to original: (\S+)", accuracies)
    assert "tuned" in accuracies and float(ratio) == pytest.approx(1, abs=5e-4)
    assert answer.split()[-1] in ("animals", "magic")
    assert "Running stage 'finetune'" in experiment and "stage 'convert'" not in experiment
    assert "accuracy after: fine-tuned" in summary
    assert "topics" in table
    (plot,) = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert plot.data["image/png"]
    (accuracy,) = re.findall(r"accuracy after: fine-tuned +(\S+)%", summary)
    assert float(accuracy) == round(100 * clone.metrics("evaluate")["tuned/accuracy"], 1)


def test_the_notebook_holds_no_outputs():
    from tests.helpers.paths import ROOT

    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
