"""Tags that configure MLflow's page, and errors of `gptj8 ui`."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import mlflow
import pytest

from gptj8.commands.main import main
from gptj8.tracking import delivery, description, page
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import params, report, runs

INLINE = pytest.mark.usefixtures("recorded_inline")


def measure(accuracy: float) -> None:
    with stage_run("evaluate", params()):
        report("evaluate", base={"accuracy": 0.4}, tuned={"accuracy": accuracy})


@INLINE
def test_run_note_contains_metrics_and_is_updated(project):
    measure(0.8)
    _, (row,) = runs()
    note = row.data.tags[page.NOTE_TAG]
    assert note.startswith("**Accuracy 40.0% → 80.0%**")
    assert "| accuracy after: fine-tuned | 80.0% |" in note
    measure(0.9)
    assert runs()[1][0].data.tags[page.NOTE_TAG].startswith("**Accuracy 40.0% → 90.0%**")


@INLINE
def test_user_written_note_is_not_overwritten(project):
    measure(0.8)
    client, (row,) = runs()
    client.set_tag(row.info.run_id, page.NOTE_TAG, "the shipped model")
    measure(0.9)
    assert runs()[1][0].data.tags[page.NOTE_TAG] == "the shipped model"


def test_run_note_contains_intervals_changes_and_command():
    measured = {
        "evaluate/quantized/perplexity_ratio": 1.0002,
        "evaluate/quantized/perplexity_ratio_low": 1.0,
        "evaluate/quantized/perplexity_ratio_high": 1.0004,
    }
    note = description.run_note(
        measured, {"params.changed": "finetune.r=4", "command": "dvc repro"}
    )
    assert "| perplexity, 8-bit / base | 1.00020 | 1.00000 to 1.00040 |" in note
    assert "Changed: `finetune.r=4`" in note
    assert "```sh\ndvc repro\n```" in note
    assert description.run_note({}, {}) is None


def test_connect_sets_missing_experiment_tags_only(project):
    uri = f"sqlite:///{project / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    old = client.create_experiment("old", tags={page.NOTE_TAG: "mine"})
    for name in ("old", "new"):
        delivery.connect(uri, name)
    assert client.get_experiment(old).tags[page.NOTE_TAG] == "mine"
    for name in ("old", "new"):
        tags = client.get_experiment_by_name(name).tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        state = json.loads(json.loads(tags[page.VIEW_TAG])["state"])
        assert "metrics.`evaluate/tuned/accuracy`" in state["selectedColumns"]
        (opened,) = [s["uuid"] for s in state["compareRunSections"] if s["display"]]
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {opened}
        assert len(tags[page.VIEW_TAG]) < 5000  # MLflow's limit


def ui_error(monkeypatch, capsys, *options: str) -> str:
    """Run `gptj8 ui`, which must fail, and return its error line."""
    monkeypatch.setattr(sys, "argv", ["gptj8", "ui", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def with_params(project):
    (project / "params.yaml").write_text("data: {train: rows.csv}\nmodel: {path: model}\n")
    return project


def test_ui_without_database_raises(with_params, monkeypatch, capsys):
    Path("mlflow.db").unlink()
    line = ui_error(monkeypatch, capsys)
    assert line.startswith("error: no run is recorded yet") and "mlflow.db does not exist" in line
    assert not Path("mlflow.db").exists()


def test_ui_with_port_in_use_raises(with_params, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        line = ui_error(monkeypatch, capsys, "--port", port)
    assert line.startswith(f"error: --host 127.0.0.1 --port {port}: ")
    assert "in use" in line


def test_ui_with_invalid_database_raises(with_params, monkeypatch, capsys):
    Path("mlflow.db").write_text("not a database, but longer than a database header\n" * 100)
    assert "not a database" in ui_error(monkeypatch, capsys, "--port", "0")
