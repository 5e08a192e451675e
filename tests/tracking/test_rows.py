"""Several clones and one server, and races in its database."""

from __future__ import annotations

import shutil

import pytest
from mlflow.exceptions import RestException

from gptj8.runtime.errors import UserError
from gptj8.runtime.project import STAGES
from gptj8.tracking import server_errors
from gptj8.tracking.delivery import Delivery
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import error_of_a_second_row, params, report, runs

pytestmark = pytest.mark.usefixtures("recorded_inline")


def run_stage(stage: str, value: float) -> None:
    with stage_run(stage, params()) as run:
        run.log_metrics({"live": value}, step=1)
        report(stage, result=value)


@pytest.fixture
def clones(project, monkeypatch):
    """Two clones of the project that record to one database; a function enters one."""
    database = f"sqlite:///{project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    other = project.parent / f"{project.name}-other"
    shutil.copytree(project, other)
    (other / "mlflow.db").unlink()
    return project, other, database


def test_clones_that_work_at_once_write_two_whole_rows(clones, monkeypatch):
    first, second, database = clones
    for stage in STAGES:
        for value, folder in ((1.0, first), (2.0, second)):
            monkeypatch.chdir(folder)
            run_stage(stage, value)
    client, rows = runs(uri=database)
    assert len(rows) == 2
    for row in rows:
        values = {row.data.metrics[f"{stage}/result"] for stage in STAGES}
        assert len(values) == 1  # nothing of the other clone
        assert row.info.status == "FINISHED"
        for stage in STAGES:
            assert len(client.get_metric_history(row.info.run_id, f"{stage}/live")) == 1


def test_clone_goes_on_with_a_row_that_another_has_completed(clones, monkeypatch):
    first, second, database = clones
    for folder in (first, second):
        monkeypatch.chdir(folder)
        for stage in STAGES:
            run_stage(stage, 1.0)
    assert len(runs(uri=database)[1]) == 1


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt])
def test_failure_of_a_clone_leaves_what_another_has_completed(clones, monkeypatch, reason):
    first, second, database = clones
    monkeypatch.chdir(first)
    for stage in STAGES:
        run_stage(stage, 1.0)
    monkeypatch.chdir(second)
    run_stage("validate", 1.0)
    with pytest.raises(reason), stage_run("convert", params()):
        raise reason
    whole = [row for row in runs(uri=database)[1] if row.info.status == "FINISHED"]
    assert len(whole) == 1
    assert "gptj8.error" not in whole[0].data.tags
    for stage in STAGES:  # and it goes on
        run_stage(stage, 1.0)
    assert {row.info.status for row in runs(uri=database)[1]} == {"FINISHED"}


def test_clone_starts_its_own_row_beside_one_that_failed(clones, monkeypatch):
    first, second, database = clones
    monkeypatch.chdir(first)
    with pytest.raises(RuntimeError), stage_run("validate", params()):
        raise RuntimeError
    monkeypatch.chdir(second)
    for stage in STAGES:
        run_stage(stage, 1.0)
    rows = runs(uri=database)[1]
    assert sorted(row.info.status for row in rows) == ["FAILED", "FINISHED"]


DUPLICATE = {
    "error_code": "BAD_REQUEST",
    "message": "(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "
    '"tag_pk"',
}


def test_unique_violation_is_tried_again(project, monkeypatch, capsys):
    failures = 3
    send = Delivery._log_metrics

    def racing(self, events):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RestException(DUPLICATE)
        send(self, events)

    monkeypatch.setattr(Delivery, "_log_metrics", racing)
    run_stage("finetune", 1.0)
    assert failures < 0
    (row,) = runs()[1]
    assert row.data.metrics["finetune/live"] == row.data.metrics["finetune/result"] == 1.0
    assert "rejected" not in capsys.readouterr().err


def test_race_that_lasts_keeps_the_journal(project, monkeypatch):
    def racing(self, events):
        raise RestException(DUPLICATE)

    monkeypatch.setattr(Delivery, "_log_metrics", racing)
    monkeypatch.setattr("gptj8.tracking.delivery._RACE_SECONDS", (0.01, 0.01))
    with pytest.raises(RestException):  # in the recorder's process: it tries again later
        run_stage("finetune", 1.0)
    assert list(project.glob(".gptj8/journal/*/*/events.jsonl"))


def test_race_of_a_real_database_is_recognized(project):
    """What MLflow raises when SQLite refuses a row that another process has inserted."""
    error = error_of_a_second_row(f"sqlite:///{project / 'mlflow.db'}", project)
    assert server_errors.is_race(error)
    assert not server_errors.is_permanent(error)


def test_missing_driver_is_named():
    with pytest.raises(UserError, match=r"postgresql\+pg8000://h/x needs a driver .*\(pg8000\)"):
        server_errors.reach("postgresql+pg8000://me:secret@h/x")


def test_invalid_value_is_permanent():
    error = RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "too long"})
    assert server_errors.is_permanent(error)
    assert not server_errors.is_race(error)
