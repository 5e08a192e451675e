"""Experiments with DVC and MLflow: each gives one complete run, also for cached stages.

The tests run a small project for several minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from gptj8.tracking.journal import flatten
from tests.helpers.project_clone import ANIMALS, MAGIC, STAGES, Clone, ran, write_rows

pytestmark = pytest.mark.long

OTHER = ["-S", "data.train=mine.csv", "-S", "data.text_column=tweet", "-S", "data.label_column=cl"]
EXPERIMENTS = {
    "lora-8": [],
    "lora-4": ["-S", "finetune.r=4"],
    "lora-2": ["-S", "finetune.r=2"],
    "norms": ["-S", "finetune.method=layernorm"],
    "other-data": OTHER,
    "one-shot": ["-S", "evaluate.few_shot=1"],
}
"""Two methods, three ranks, another dataset, and a change of only the evaluation."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    clone = Clone(tmp_path_factory.mktemp("experiments") / "project", tiny_model_dir)
    write_rows(clone.folder / "mine.csv", "tweet", "cl", {"wild": ANIMALS, "works": MAGIC})
    clone.dvc("remote", "add", "--default", "shared", str(clone.folder.parent / "shared"))
    clone.git("add", "-A")
    clone.git("commit", "--quiet", "-m", "another dataset and a remote")
    assert ran(clone.dvc("repro")) == list(STAGES)
    clone.git("add", "-A")
    clone.git("commit", "--quiet", "-m", "the first results")
    return clone


def experiment(clone: Clone, name: str, *options: str) -> list[str]:
    """Run an experiment from the committed state, and return the stages that ran."""
    clone.git("checkout", "--", ".")
    clone.dvc("checkout")
    process = clone.dvc("exp", "run", "--name", name, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "has not received all" not in process.stderr
    return ran(process)


def assert_complete(clone: Clone, run: mlflow.entities.Run, revision: str) -> None:
    """Check that a run contains everything in the experiment's commit, without duplicates."""
    client = clone.client()
    refs = clone.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    revision = next((ref for ref in refs if ref.endswith(f"/{revision}")), revision)
    assert run.info.status == "FINISHED"
    for stage in STAGES:
        content = json.loads(clone.git("show", f"{revision}:reports/{stage}/metrics.json"))
        for key, value in flatten(content, "/").items():
            assert run.data.metrics[f"{stage}/{key}"] == pytest.approx(value), key
            assert len(client.get_metric_history(run.info.run_id, f"{stage}/{key}")) >= 1
        assert run.data.tags[f"stage.{stage}"] in ("ran", "cached")
    params = YAML(typ="safe").load(clone.git("show", f"{revision}:params.yaml"))
    params.pop("tracking")
    assert set(run.data.params) == set(flatten(params, "."))
    assert run.data.params["finetune.r"] == str(params["finetune"]["r"])
    for key in ("loss", "grad_norm", "learning_rate", "memory_gib"):
        points = client.get_metric_history(run.info.run_id, f"finetune/{key}")
        steps = [point.step for point in points]
        assert len(steps) > 3 and len(set(steps)) == len(steps), (key, steps)
    assert client.get_metric_history(run.info.run_id, "finetune/eval_accuracy")
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files >= {"adapter", "export", "lineage", "reports", "predictions.json"}
    assert {i.path for i in client.list_artifacts(run.info.run_id, "reports")} == {
        f"reports/{stage}" for stage in STAGES
    }
    assert {i.dataset.name for i in run.inputs.dataset_inputs} >= {"dataset"}
    for tag in ("mlflow.source.git.commit", "command", "hardware.cpu", "digest.data.train"):
        assert run.data.tags[tag]


def named(clone: Clone) -> dict[str, mlflow.entities.Run]:
    return {run.info.run_name: run for run in clone.runs().values()}


def test_six_experiments_are_six_complete_runs(clone):
    first = set(clone.runs())
    assert len(first) == 1
    started = {
        name: experiment(clone, name, *options)
        for name, options in EXPERIMENTS.items()
        if name != "lora-8"  # already run by `dvc repro`
    }
    assert started["lora-4"] == started["norms"] == ["finetune", "evaluate", "export"]
    assert started["one-shot"] == ["evaluate", "export"]
    rows = named(clone)
    assert len(rows) == len(EXPERIMENTS) == len(clone.runs())
    for name in started:
        assert_complete(clone, rows[name], name)
    (default,) = first
    assert_complete(clone, clone.runs()[default], "HEAD")
    assert rows["lora-4"].data.tags["stage.convert"] == "cached"
    assert rows["one-shot"].data.tags["stage.finetune"] == "cached"
    assert rows["one-shot"].data.tags["stage.evaluate"] == "ran"


def test_rerunning_experiments_changes_nothing(clone):
    before = {run_id: (run.data.params, run.data.metrics) for run_id, run in clone.runs().items()}
    for name, options in EXPERIMENTS.items():
        if name != "lora-8":
            assert experiment(clone, f"{name}-again", *options) == []
    after = {run_id: (run.data.params, run.data.metrics) for run_id, run in clone.runs().items()}
    assert after.keys() == before.keys()
    for run_id, (params, metrics) in before.items():
        assert after[run_id][0] == params
        own = {k: v for k, v in metrics.items() if not k.startswith("system/")}
        assert {k: v for k, v in after[run_id][1].items() if not k.startswith("system/")} == own


def test_lost_database_is_refilled_from_cache(clone):
    """The same applies to a new tracking server: no stage runs, and every run is complete."""
    (clone.folder / "mlflow.db").rename(clone.folder / "lost.db")
    for name, options in EXPERIMENTS.items():
        if name != "lora-8":
            assert experiment(clone, f"{name}-refilled", *options) == []
    rows = named(clone)
    assert set(rows) == {f"{name}-refilled" for name in EXPERIMENTS if name != "lora-8"}
    for name, run in rows.items():
        assert_complete(clone, run, name)
        assert {run.data.tags[f"stage.{stage}"] for stage in STAGES} == {"cached"}
    clone.git("checkout", "--", ".")
    clone.dvc("checkout")
    assert "MLflow run was completed" in gptj8(clone, "sync").stdout
    assert len(clone.runs()) == len(EXPERIMENTS)


def gptj8(clone: Clone, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))}
    command = [sys.executable, "-m", "gptj8.commands.main", *arguments]
    process = subprocess.run(
        command, cwd=clone.folder, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return process


def test_sweep_has_a_parent_run(clone):
    clone.git("checkout", "--", ".")
    known = set(clone.runs())
    queued = clone.dvc("exp", "run", "--queue", "--name", "ranks", "-S", "finetune.r=3,5")
    assert queued.returncode == 0, queued.stderr
    assert clone.dvc("queue", "start", "--jobs", "1").returncode == 0
    until = time.monotonic() + 400
    while True:
        status = clone.dvc("queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            break
        assert time.monotonic() < until, status
        time.sleep(2)
    assert "Failed" not in status, status
    new = {run_id: run for run_id, run in clone.runs().items() if run_id not in known}
    (parent,) = [run for run in new.values() if run.data.tags.get("gptj8.kind") == "sweep"]
    children = [
        run for run in new.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 2 == len(new) - 1
    assert {run.data.params["finetune.r"] for run in children} == {"3", "5"}
    for run in children:
        assert_complete(clone, run, run.info.run_name)


def test_reproduced_run_is_byte_identical(clone):
    clone.git("checkout", "--", ".")
    (found,) = gptj8(clone, "find", "lora-4").stdout.split("\n")[:1]
    run_id = found.split()[0]
    shown = gptj8(clone, "reproduce", run_id)
    assert f"run {run_id} is reproduced: the adapter is byte-identical" in shown.stdout
    assert not list((clone.folder / ".gptj8" / "reproduce").glob("*"))
    assert clone.git("worktree", "list").count("\n") == 1


def test_results_are_shared_through_dvc_remote(clone, tmp_path):
    """A second clone gets code from git and results from the DVC remote, and reruns nothing."""
    clone.git("checkout", "--", ".")
    clone.dvc("checkout")
    repository = tmp_path / "repository.git"
    clone.git("init", "--quiet", "--bare", str(repository))
    clone.git("remote", "set-url", "origin", str(repository))
    clone.git("push", "--quiet", "origin", "HEAD:refs/heads/trunk")
    assert clone.dvc("push", "--run-cache").returncode == 0
    assert clone.dvc("exp", "push", "origin", "lora-2").returncode == 0

    colleague = object.__new__(Clone)
    colleague.folder = tmp_path / "colleague"
    clone.git("clone", "--quiet", "-b", "trunk", str(repository), str(colleague.folder))
    assert colleague.dvc("pull").returncode == 0
    assert ran(colleague.dvc("repro")) == []
    assert (colleague.folder / "artifacts" / "export" / "README.md").is_file()
    assert colleague.dvc("exp", "pull", "origin", "lora-2").returncode == 0
    assert colleague.dvc("exp", "apply", "lora-2").returncode == 0
    adapter = json.loads((colleague.folder / "artifacts/adapter/adapter_config.json").read_text())
    assert adapter["r"] == 2
    params = YAML(typ="safe").load((colleague.folder / "params.yaml").read_text())
    assert params["finetune"]["r"] == 2
    shutil.rmtree(tmp_path / "colleague")


def test_dvc_shows_metrics_plots_and_experiments(clone, tmp_path):
    clone.git("checkout", "--", ".")
    clone.dvc("checkout")
    metrics = json.loads(clone.dvc("metrics", "show", "--json").stdout)
    assert "tuned" in str(metrics) and "perplexity_ratio" in str(metrics)
    changed = json.loads(clone.dvc("metrics", "diff", "lora-2", "lora-4", "--json").stdout)
    assert "reports/finetune/metrics.json" in changed
    page = tmp_path / "page"
    shown = clone.dvc("plots", "diff", "lora-2", "lora-4", "--out", str(page))
    assert shown.returncode == 0, shown.stderr
    text = (page / "index.html").read_text()
    for plot in (
        "training loss",
        "validation accuracy",
        "confusion",
        "error of each",
        "token lengths",
    ):
        assert plot in text, plot
    assert "finetune" in clone.dvc("dag").stdout


def test_experiments_table_fits_a_screen(clone):
    clone.git("checkout", "--", ".")
    shown = gptj8(clone, "experiments").stdout
    header = shown.splitlines()[0]
    assert len(header) <= 160, shown
    for column in ("accuracy", "perplexity ratio", "finetune.r", "peak GiB", "tokens/s"):
        assert column in header, shown
    for name in ("lora-4", "norms", "one-shot"):
        assert name in shown


def test_server_with_authentication(clone, tmp_path):
    """With a wrong password a stage only warns, and with the right one sync sends its journal.

    No password is written to a file.
    """
    from tests.helpers.servers import mlflow_server

    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{tmp_path / 'users.db'}\n"
        "admin_username = boss\nadmin_password = a-long-password-1\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secret = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    with mlflow_server(tmp_path, "--app-name", "basic-auth", environment=secret) as port:
        address = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
        user = {"MLFLOW_TRACKING_USERNAME": "boss", "MLFLOW_TRACKING_PASSWORD": "a-long-password-1"}
        wrong = {**user, "MLFLOW_TRACKING_PASSWORD": "guess"}
        clone.git("checkout", "--", ".")
        clone.dvc("checkout")
        unsent = with_environment(clone, {**address, **wrong}, "-m", "stages.record")
        assert unsent.returncode == 0
        assert "MLflow has not received all of record yet" in unsent.stderr
        sent = with_environment(clone, {**address, **user}, "-m", "gptj8.commands.main", "sync")
        assert sent.returncode == 0, sent.stderr
        assert "stages sent: 1\n" in sent.stdout
        for file in Path(clone.folder / ".gptj8").rglob("*"):
            assert not file.is_file() or b"guess" not in file.read_bytes()
        count = (
            "import mlflow; c = mlflow.MlflowClient(); e = c.get_experiment_by_name('gptj8');"
            "(r,) = c.search_runs([e.experiment_id]);"
            "print(r.info.status, sum(k.startswith('stage.') for k in r.data.tags))"
        )
        counted = with_environment(clone, {**address, **user}, "-c", count)
        assert counted.stdout.split() == ["FINISHED", "5"], counted.stderr


def with_environment(
    clone: Clone, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=clone.folder, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
