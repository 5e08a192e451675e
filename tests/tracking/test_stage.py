"""Stages of one experiment write to one MLflow run, which is read back with a separate client."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from gptj8.runtime.errors import UserError
from gptj8.runtime.project import STAGES
from gptj8.serving.registry import register_export
from gptj8.tracking import identity
from gptj8.tracking.comparison import log_comparison
from gptj8.tracking.identity import tracking_uri
from gptj8.tracking.journal import flatten
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import params, report, runs

pytestmark = pytest.mark.usefixtures("recorded_inline")


def test_stages_of_one_experiment_share_a_run(project):
    for stage in STAGES:
        with stage_run(stage, params()) as run:
            run.log_metrics({"live": 1.5, "nested": {"deep": 2}, "speed": 10}, step=3)
            report(stage, seconds=4, speed=11, text="not a number")
    client, (row,) = runs()
    for stage in STAGES:
        assert row.data.metrics[f"{stage}/live"] == 1.5
        assert row.data.metrics[f"{stage}/nested/deep"] == 2
        assert row.data.metrics[f"{stage}/seconds"] == 4
        assert row.data.metrics[f"{stage}/speed"] == 11  # the result, not the last live value
        assert row.data.tags[f"stage.{stage}"] == "ran"
        assert client.list_artifacts(row.info.run_id, f"reports/{stage}")
    assert [m.step for m in client.get_metric_history(row.info.run_id, "finetune/live")] == [3]
    assert row.info.status == "FINISHED"
    assert row.data.params["finetune.r"] == "8"
    assert row.data.params["data.train"] == "rows.csv"


def test_cached_stages_are_recorded_too(project):
    report("validate", rows=7)
    report("convert", relative_rmse=0.006)
    report("finetune", eval_loss=1.0)
    Path("reports/finetune/loss.csv").write_text("step,loss,grad_norm\n10,3.5,1\n20,2.5,\n")
    Path("artifacts/adapter").mkdir(parents=True)
    Path("artifacts/adapter/adapter_config.json").write_text("{}")
    with stage_run("evaluate", params()):
        report("evaluate", tuned={"accuracy": 0.8})
    client, (row,) = runs()
    curve = client.get_metric_history(row.info.run_id, "finetune/loss")
    assert [(point.step, point.value) for point in curve] == [(10, 3.5), (20, 2.5)]
    assert row.data.metrics["finetune/eval_loss"] == 1.0
    assert client.list_artifacts(row.info.run_id, "adapter")
    assert row.data.metrics["validate/rows"] == 7
    assert row.data.metrics["evaluate/tuned/accuracy"] == 0.8
    tags = {stage: row.data.tags.get(f"stage.{stage}") for stage in STAGES}
    assert tags == {
        "validate": "cached",
        "convert": "cached",
        "finetune": "cached",
        "evaluate": "ran",
        "export": None,
    }


def test_experiment_key_depends_on_params_data_and_model(project):
    first = identity.key_of(params())
    assert identity.key_of(params()) == first
    assert identity.key_of(params(tracking={"experiment": "other"})) == first
    assert identity.key_of(params(finetune={"r": 4})) != first
    (project / "rows.csv").write_text("text,label\na,c\nd,e\n")
    second = identity.key_of(params())
    assert second != first
    (project / "model" / "config.json").write_text('{"n_layer": 2}')
    assert identity.key_of(params()) != second


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_failed_or_interrupted_stage_is_marked(project, error, status):
    with pytest.raises(error), stage_run("convert", params()):
        raise error
    assert runs()[1][0].info.status == status


def test_relative_database_path_starts_at_project_in_dvc_experiments(project, monkeypatch):
    copy = project / ".dvc" / "tmp" / "exps" / "standalone" / "tmp123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert tracking_uri(params()) == f"sqlite:///{project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(params()) == "http://127.0.0.1:1"


def test_run_has_name_of_dvc_experiment(project, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    with stage_run("validate", params()):
        pass
    row = runs()[1][0]
    assert row.info.run_name == "brave-fox"
    assert row.data.tags["dvc.experiment"] == "brave-fox"


@pytest.mark.usefixtures("recorded_beside")
def test_stage_continues_without_server(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    done = []
    with stage_run("validate", params()) as run:
        run.log_metrics({"x": 1})
        done.append(True)
    assert done == [True]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line]
    assert warning.startswith("warning: MLflow has not received all of validate yet")
    assert "gptj8 sync" in warning


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}, "/") == {
        "a/b": 1,
        "a/c/d": 2,
        "e": 3,
    }


def test_convert_does_not_record_report_of_other_dataset(project):
    report("validate", rows=999)  # from the previous experiment
    with stage_run("convert", params()):
        report("convert", relative_rmse=0.006)
    _, (row,) = runs()
    assert "validate/rows" not in row.data.metrics
    assert row.data.metrics["convert/relative_rmse"] == 0.006


def test_no_run_is_created_before_inputs_exist(project):
    (project / "rows.csv").unlink()
    with stage_run("convert", params()):
        report("convert", relative_rmse=0.006)
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert client.get_experiment_by_name("gptj8") is None


@pytest.mark.usefixtures("recorded_beside")
def test_unreachable_server_delays_stage_by_seconds(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    started = time.monotonic()
    with stage_run("validate", params()):
        pass
    assert time.monotonic() - started < 20
    assert "MLflow has not received all of validate yet" in capsys.readouterr().err


def test_moved_project_warns_about_artifact_location(project, capsys, monkeypatch):
    with stage_run("validate", params()):
        pass
    assert "artifacts" not in capsys.readouterr().err
    moved = project.parent / "moved"
    project.rename(moved)
    monkeypatch.chdir(moved)
    with stage_run("validate", params()):
        pass
    assert "the artifacts of experiment gptj8 are stored in" in capsys.readouterr().err


@pytest.mark.usefixtures("recorded_beside")
def test_failed_registration_raises(project, monkeypatch):
    """Other recording errors are only warnings, but a deployment relies on the registration."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with (
        pytest.raises(UserError, match="registered_model_name = sentiment: registration failed"),
        stage_run("export", params()) as run,
    ):
        register_export(run.open_run, "sentiment", project / "base", project / "export", {})


def test_repeated_comparison_updates_one_run(project):
    rows = [
        {"approach": "lora: tuned", "status": "done", "experiment": "a-1", "accuracy": 0.5},
        {"approach": "base", "status": "evaluated", "experiment": "", "accuracy": 0.25},
    ]
    (project / "approaches.md").write_text("| a |")
    for accuracy in (0.5, 0.75):
        rows[0]["accuracy"] = accuracy
        log_comparison(params(), rows, [project / "approaches.md"])
    client, (row,) = runs()
    assert row.data.metrics == {"lora_ tuned/accuracy": 0.75, "base/accuracy": 0.25}
    assert row.data.tags["gptj8.kind"] == "comparison"
    assert row.data.tags["approach.lora: tuned"] == "a-1"
    (file,) = client.list_artifacts(row.info.run_id, "approaches")
    assert file.path == "approaches/approaches.md"


@pytest.mark.usefixtures("recorded_beside")
def test_adapters_of_runs_that_wait_for_a_server_take_no_space(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    adapter = project / "artifacts" / "adapter"
    for number in range(4):
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_bytes(bytes([number]) * 1_000_000)
        report("finetune", eval_loss=1.0)
        with stage_run("finetune", params(seed=number)):
            pass
        # What DVC does when the stage has ended: a copy in its cache, not a link.
        subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "artifacts/adapter"], check=True)
    kept = list(project.glob(".gptj8/journal/*/*/files/*/adapter/*"))
    until = time.monotonic() + 30  # the recorders work beside the stages
    while sum(path.stat().st_nlink == 1 for path in kept) > 1 and time.monotonic() < until:
        time.sleep(0.1)
    # Five copies: four adapters in DVC's cache, and the last journal's own copy, because only a
    # later run replaces it with a link to the cache.
    used = disk_usage(project / ".dvc", project / ".gptj8")
    assert used == pytest.approx(5_000_000, abs=200_000)
    contents = sorted(path.read_bytes() for path in kept)
    assert contents == [bytes([number]) * 1_000_000 for number in range(4)]


def disk_usage(*folders):
    """Bytes below folders; content with several names counts once."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files = {path.stat().st_ino: path.stat().st_size for path in paths}
    return sum(files.values())
