"""Several clones that record to PostgreSQL at once, directly and through a tracking server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from gptj8.runtime.project import STAGES
from gptj8.tracking import server_errors
from tests.helpers.paths import ROOT
from tests.helpers.postgres import postgres_server
from tests.helpers.servers import free_port, mlflow_server
from tests.helpers.tracked_project import error_of_a_second_row, runs

pytestmark = pytest.mark.slow

CLONE = """
import sys, time
from gptj8.params.sections import load_params
from gptj8.runtime.project import STAGES
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import report
value = float(sys.argv[1])
for stage in STAGES:
    with stage_run(stage, load_params()) as run:
        for step in range(1, 21):
            run.log_metrics({f"live{n}": value + n / step for n in range(5)}, step)
        report(stage, **{f"result{n}": value for n in range(20)})
"""


@pytest.fixture(scope="module")
def database():
    with postgres_server() as uri:
        yield uri


@pytest.fixture(params=["server", "database"])
def tracking(request, database, tmp_path_factory):
    """The URI of a tracking server with the database, or of the database itself."""
    if request.param == "database":
        yield database
        return
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, "--backend-store-uri", database) as port:
        yield f"http://127.0.0.1:{port}"


def test_clones_that_begin_at_once_leave_whole_rows(project, tracking, request):
    name = request.node.name
    (project / "params.yaml").write_text(
        "data: {train: rows.csv}\nmodel: {path: model}\n"
        f"tracking: {{experiment: '{name}', uri: '{tracking}'}}\n"
    )
    (project / "mlflow.db").unlink()
    folders = [project, *(project.parent / f"{project.name}-{n}" for n in (2, 3))]
    for folder in folders[1:]:
        shutil.copytree(project, folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    environment["MLFLOW_TRACKING_URI"] = tracking
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLONE, str(value)],
            cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for value, folder in enumerate(folders, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=500)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    assert not any("rejected" in text for text in errors), errors
    for folder in folders:
        command = [sys.executable, "-m", "gptj8.commands.main", "sync"]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    client, rows = runs(name, tracking)
    assert 1 <= len(rows) <= 3
    for row in rows:
        assert row.info.status == "FINISHED"
        results = {key: value for key, value in row.data.metrics.items() if "/result" in key}
        assert len(results) == 20 * len(STAGES)
        assert len(set(results.values())) == 1  # all of one clone
        for stage in STAGES:
            assert row.data.tags[f"stage.{stage}"] == "ran"
            curve = client.get_metric_history(row.info.run_id, f"{stage}/live3")
            assert sorted(point.step for point in curve) == list(range(1, 21))


def test_unique_violation_of_postgresql_is_a_race(database, tmp_path):
    """The error that MLflow raises if another process has just written the same row."""
    error = error_of_a_second_row(database, tmp_path)
    assert server_errors.is_race(error)
    assert not server_errors.is_permanent(error)


def test_database_that_does_not_respond_is_told_from_one_that_refuses(database, project):
    """In seconds: MLflow alone would try for an hour."""
    from gptj8.params.sections import load_params
    from gptj8.runtime.errors import UserError
    from gptj8.tracking.lookup import find

    def failure(uri: str) -> str:
        (project / "params.yaml").write_text(
            f"data: {{train: rows.csv}}\nmodel: {{path: model}}\ntracking: {{uri: '{uri}'}}\n"
        )
        begun = time.monotonic()
        with pytest.raises(UserError) as raised:
            find(None, load_params())
        assert time.monotonic() - begun < 20
        return str(raised.value)

    closed = database.replace(database.rpartition(":")[2].partition("/")[0], str(free_port()))
    assert "does not respond: " in failure(closed)
    missing = failure(database.replace("/postgres", "/missing"))
    assert "responds with an error: " in missing and "does not exist" in missing
