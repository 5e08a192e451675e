"""A row is what made it: another code or library gives another row, and the old one stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.tracking import identity, lookup, provenance, reproduction
from gptj8.tracking.stage import stage_run
from tests.helpers.paths import ROOT
from tests.helpers.tracked_project import params, report, runs

pytestmark = pytest.mark.usefixtures("recorded_inline")

PIPELINE = """\
stages:
  finetune:
    cmd: python train.py
    deps: [train.py, "${data.train}", "${model.path}"]
    metrics:
      - reports/finetune/metrics.json: {cache: false}
"""
PARAMS = "data: {train: rows.csv}\nmodel: {path: model}\n"


@pytest.fixture
def pipeline(project):
    (project / "dvc.yaml").write_text(PIPELINE)
    (project / "params.yaml").write_text(PARAMS)
    (project / "train.py").write_text("print(1)\n")
    (project / ".gitignore").write_text(
        "mlflow.db*\n/mlartifacts\n/.gptj8\n/.dvc/tmp\n/.dvc/cache\n"
    )
    subprocess.run(["git", "init", "-q", "-b", "trunk"], cwd=project, check=True)
    dvc("init", "--quiet")
    return project


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True)


def train(loss: float) -> None:
    """Record what a stage does: a curve of two points and a result."""
    with stage_run("finetune", load_params()) as run:
        for step in (1, 2):
            run.log_metrics({"loss": loss / step}, step)
        report("finetune", eval_loss=loss)


def commit(folder: Path) -> str:
    git = ["git", "-c", "user.email=t@example.org", "-c", "user.name=t"]
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], cwd=folder, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    return head.stdout.strip()


def lock_and_commit(folder: Path) -> str:
    """Let DVC itself write dvc.lock for what is in place, and commit it."""
    dvc("commit", "--force", "--quiet")
    return commit(folder)


def test_changed_code_gives_a_new_row_and_the_old_commit_has_its_own(pipeline):
    train(1.0)
    old = lock_and_commit(pipeline)
    (pipeline / "train.py").write_text("print(2)\n")
    train(0.5)
    new = lock_and_commit(pipeline)
    client, rows = runs()
    assert sorted(row.data.metrics["finetune/eval_loss"] for row in rows) == [0.5, 1.0]
    for row in rows:
        curve = client.get_metric_history(row.info.run_id, "finetune/loss")
        assert [point.step for point in curve] == [1, 2]
        assert curve[0].value == row.data.metrics["finetune/eval_loss"]
    for revision, loss in ((old, 1.0), (new, 0.5)):
        found = lookup.find(revision, load_params())[0]
        assert found.data.metrics["finetune/eval_loss"] == loss
    assert lookup.find(None, load_params())[0].data.metrics["finetune/eval_loss"] == 0.5


def test_commit_of_code_that_did_not_run_has_no_row(pipeline):
    """dvc.lock has the digests of the last run, which are not those of the commit's code."""
    train(1.0)
    lock_and_commit(pipeline)
    (pipeline / "train.py").write_text("print(2)\n")
    new = commit(pipeline)
    with pytest.raises(UserError, match="has no run in gptj8"):
        lookup.find(new, load_params())


def test_rerun_from_a_clean_commit_forgets_the_earlier_changes(pipeline):
    """The row is the same, because the same code and params make it."""
    commit(pipeline)
    (pipeline / "params.yaml").write_text(PARAMS + "seed: 5\n")
    (pipeline / "train.py").write_text("print(2)\n")
    train(1.0)
    (row,) = runs()[1]
    assert row.data.tags["params.changed"] == "seed=5"
    assert row.data.tags["code.changed"] == "train.py"
    head = commit(pipeline)
    train(1.0)
    client, (row,) = runs()
    assert row.data.tags["mlflow.source.git.commit"] == head
    assert not {"params.changed", "code.changed"} & row.data.tags.keys()
    assert "Changed" not in row.data.tags["mlflow.note.content"]
    lineage = Path(client.download_artifacts(row.info.run_id, "lineage"))
    assert (lineage / "changes.diff").is_file()  # of the first time; the commit has these changes
    assert reproduction.recorded_patch(row.data.tags, lineage) is None


def test_the_same_again_and_the_old_code_again_go_on_with_their_rows(pipeline):
    train(1.0)
    (pipeline / "train.py").write_text("print(2)\n")
    train(0.5)
    train(0.5)
    (pipeline / "train.py").write_text("print(1)\n")
    train(1.0)
    client, rows = runs()
    assert len(rows) == 2
    for row in rows:
        curve = client.get_metric_history(row.info.run_id, "finetune/loss")
        assert [point.step for point in curve] == [1, 2]


def test_other_libraries_give_a_new_row(pipeline, monkeypatch):
    train(1.0)
    old = lock_and_commit(pipeline)
    installed = provenance.library_versions()
    assert installed["torch"] and "+" not in installed["torch"]
    monkeypatch.setattr(identity, "library_versions", lambda: {**installed, "torch": "99.0"})
    train(0.5)
    _, rows = runs()
    assert sorted(row.data.metrics["finetune/eval_loss"] for row in rows) == [0.5, 1.0]
    versions = {
        row.data.tags[identity.LIBRARIES_TAG].split("torch==")[1].split()[0] for row in rows
    }
    assert versions == {"99.0", installed["torch"]}
    # A commit does not know its libraries: both rows are shown, the newest first.
    found = lookup.find(old, load_params())
    assert [row.data.metrics["finetune/eval_loss"] for row in found] == [0.5, 1.0]


def test_completing_earlier_results_after_an_upgrade_makes_no_row(pipeline, monkeypatch):
    """`record` runs although nothing was made again, for example after `dvc checkout`."""
    train(1.0)
    installed = provenance.library_versions()
    monkeypatch.setattr(identity, "library_versions", lambda: {**installed, "torch": "99.0"})
    with stage_run("record", load_params()):
        pass
    assert len(runs()[1]) == 1


def test_code_digests_are_those_of_dvc(pipeline):
    (pipeline / "package").mkdir()
    (pipeline / "package" / "a.py").write_text("a\n")
    (pipeline / "dvc.yaml").write_text(PIPELINE.replace("[train.py,", "[train.py, package,"))
    report("finetune", eval_loss=1.0)
    dvc("commit", "--force", "--quiet")
    yaml = YAML(typ="safe", pure=True)
    declared, lock = (yaml.load(Path(name).read_text()) for name in ("dvc.yaml", "dvc.lock"))
    digests = provenance.code_digests()
    assert set(digests) == {"package", "train.py"}
    assert digests == provenance.locked_code_digests(declared, lock)


def test_code_of_this_project_is_what_dvc_yaml_names():
    declared = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    named = {
        dep
        for stage in declared["stages"].values()
        for dep in stage["deps"]
        if dep.startswith(("gptj8/", "stages/"))
    }
    assert set(provenance.code_digests(ROOT)) == named | {"data/chat_templates"}


def test_copied_or_moved_workspace_is_another_one(project, monkeypatch):
    first = identity.workspace_id()
    assert identity.workspace_id() == first
    moved = project.parent / f"{project.name}-moved"
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert identity.workspace_id() != first


def test_key_is_unknown_without_inputs(project):
    (project / "rows.csv").unlink()
    assert identity.identify(params()) is None
