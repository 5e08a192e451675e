"""The lineage of a run, and finding a run by its commit, in real git repositories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.tracking import identity, lineage, lookup
from gptj8.tracking.stage import stage_run
from gptj8.tracking.stage_results import remember_that_it_ran

pytestmark = pytest.mark.usefixtures("recorded_inline")

PARAMS = "data:\n  train: rows.csv\nmodel:\n  path: model\nfinetune:\n  r: 8\n"


@pytest.fixture
def repository(project):
    for command in (["init", "-q", "-b", "trunk"], ["config", "user.name", "t"]):
        subprocess.run(["git", *command], cwd=project, check=True)
    (project / ".gitignore").write_text("mlflow.db*\n/mlartifacts\n/.gptj8\n/.dvc\n")
    (project / "params.yaml").write_text(PARAMS)
    (project / "code.py").write_text("print(1)\n")
    commit(project)
    return project


def commit(folder: Path) -> str:
    git = ["git", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], cwd=folder, check=True)
    return lineage.git("rev-parse", "HEAD", folder=folder) or ""


def test_clean_commit_needs_only_checkout_and_repro(repository):
    commit = lineage.git("rev-parse", "HEAD", folder=repository)
    tags = lineage.lineage_tags(repository)
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["git.dirty"] == "false"
    assert tags["command"] == f"git checkout {commit} && dvc repro"
    assert int(tags["hardware.cores"]) >= 1
    assert lineage.changes(repository) == ""


def test_changed_params_become_overrides_and_changed_code_becomes_patch(repository, tmp_path):
    (repository / "params.yaml").write_text(PARAMS.replace("r: 8", "r: 4"))
    tags = lineage.lineage_tags(repository)
    assert tags["git.dirty"] == "true"
    assert tags["command"].endswith("&& dvc exp run -S finetune.r=4")
    (repository / "code.py").write_text("print(2)\n")
    (repository / "new.py").write_text("")
    assert lineage.lineage_tags(repository)["command"].endswith(
        "&& git apply changes.diff && dvc repro"
    )
    assert lineage.unknown_files(repository) == "new.py\n"
    patch = tmp_path / "changes.diff"
    patch.write_text(lineage.changes(repository))
    subprocess.run(["git", "stash", "-q"], cwd=repository, check=True)
    subprocess.run(["git", "apply", str(patch)], cwd=repository, check=True)
    assert (repository / "code.py").read_text() == "print(2)\n"
    assert "r: 4" in (repository / "params.yaml").read_text()


def test_results_are_not_changes(repository):
    (repository / "reports").mkdir()
    (repository / "reports" / "x.json").write_text("1")
    (repository / "dvc.lock").write_text("a: 1\n")
    commit(repository)
    (repository / "reports" / "x.json").write_text("2")
    (repository / "dvc.lock").write_text("a: 2\n")
    assert lineage.changes(repository) == ""


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 0.002, 1e-9, "cat", "null", "3", "true", "", "two words", "it's", "a=b,c",
        "{text}\n\nLabel:", 'say "x"', "back\\slash", "end\\", "\\'", "\\\\'x",
        ["attention", "mlp.fc_in"], [],
        ["tuned/accuracy > base/accuracy"], "ü", "tab\there", "[a]", "~", "1_000",
    ],
)  # fmt: skip
def test_overrides_round_trip_through_dvc(tmp_path, value):
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    file.write_text("a:\n  b: other\n")
    ((_, overrides),) = to_path_overrides([lineage.override("a.b", value)]).items()
    apply_overrides(file, overrides)
    assert YAML(typ="safe", pure=True).load(file.read_text()) == {"a": {"b": value}}


def test_without_password_removes_credentials():
    assert identity.without_password("http://me:secret@host:1/x") == "http://host:1/x"
    assert identity.without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_run_is_found_from_commit_without_data(repository):
    digests = identity.input_digests(load_params())
    lock = {"stages": {"validate": {"deps": [
        {"path": "rows.csv", "md5": digests["data.train"]},
        {"path": "model", "md5": digests["model.path"]},
    ]}}}  # fmt: skip
    with open("dvc.lock", "w") as stream:
        YAML(typ="safe").dump(lock, stream)
    revision = commit(repository)
    with stage_run("validate", load_params()):
        pass
    (repository / "params.yaml").write_text(PARAMS.replace("r: 8", "r: 4"))
    commit(repository)
    (run,) = lookup.find(revision[:10], load_params())
    assert run.data.params["finetune.r"] == "8"
    assert lookup.find(run.info.run_id, load_params())[0].info.run_id == run.info.run_id
    with pytest.raises(UserError, match=r"the current params\.yaml has no run yet"):
        lookup.find(None, load_params())
    with pytest.raises(UserError, match="nothing-like-it is not a known run, DVC"):
        lookup.find("nothing-like-it", load_params())
    (repository / "params.yaml").write_text(PARAMS)
    assert lookup.find(None, load_params())[0].info.run_id == run.info.run_id


def test_run_is_found_by_each_experiment_name(repository, monkeypatch):
    for name in ("brave-fox", "calm-owl"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        with stage_run("validate", load_params()):
            pass
    monkeypatch.delenv("DVC_EXP_NAME")
    found = [lookup.find(name, load_params())[0].info.run_id for name in ("brave-fox", "calm-owl")]
    assert len(set(found)) == 1
    with pytest.raises(UserError):
        lookup.find("brave", load_params())  # a part of a name must not match


def test_stage_that_ran_before_inputs_existed_is_tagged_ran(repository):
    folder = repository / "reports" / "convert"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"relative_rmse": 0.006}')
    (repository / "rows.csv").rename(repository / "later.csv")
    with stage_run("convert", load_params()):
        pass
    (repository / "later.csv").rename(repository / "rows.csv")
    with stage_run("finetune", load_params()):
        pass
    (run,) = lookup.find(None, load_params())
    assert run.data.tags["stage.convert"] == "ran"
    remember_that_it_ran("convert")
    (folder / "metrics.json").write_text('{"relative_rmse": 0.007}')
    (repository / "params.yaml").write_text(PARAMS.replace("r: 8", "r: 4"))
    with stage_run("finetune", load_params()):
        pass
    (run,) = lookup.find(None, load_params())
    assert run.data.tags["stage.convert"] == "cached"


def test_sweep_name_contains_baseline_and_experiment_name(repository, monkeypatch):
    assert identity.sweep_name() is None
    copy = repository / ".dvc" / "tmp" / "exps" / "tmp1"
    standalone = repository / ".dvc" / "tmp" / "exps" / "standalone" / "tmp2"
    for folder in (copy, standalone):
        folder.mkdir(parents=True)
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0123456789")
    monkeypatch.chdir(copy)
    assert identity.sweep_name() == "queue from 0123456"
    monkeypatch.setenv("DVC_EXP_NAME", "ranks-2")
    assert identity.sweep_name() == "ranks from 0123456"
    monkeypatch.chdir(standalone)
    assert identity.sweep_name() is None


def test_find_prints_status_and_command(repository, monkeypatch, capsys):
    from gptj8.commands.main import main

    with stage_run("validate", load_params()):
        pass
    monkeypatch.setattr(sys, "argv", ["gptj8", "find"])
    main()
    out = capsys.readouterr().out
    assert "finished" in out
    assert "dvc repro" in out
