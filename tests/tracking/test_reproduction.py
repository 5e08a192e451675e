"""`gptj8 reproduce` where runs are made: subfolders, odd paths, `dvc add`, recipes, a lost copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptj8.runtime.dvc_digests import cache_folder, dvc_digest, restore
from gptj8.runtime.errors import UserError
from gptj8.tracking import checkout, lineage
from tests.helpers.paths import ROOT
from tests.helpers.project_clone import Clone

RECIPE = """\
stages:
  make:
    cmd: python make.py
    deps: [make.py]
    outs: [model]
"""


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    process = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return process.stdout.strip()


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """A project in a subfolder of a repository, with a path that is hard on every parser."""
    top = tmp_path / "Größe # 1"
    project = top / "my models #2"
    (project / "recipe").mkdir(parents=True)
    git(top, "init", "-q", "-b", "trunk")
    dvc(project, "init", "--subdir", "--quiet")
    (project / "params.yaml").write_text("data: {train: rows.csv}\nmodel: {path: recipe/model}\n")
    (project / "dvc.yaml").write_text("stages: {}\n")
    (project / "rows.csv").write_text("text,label\na,b\n")
    dvc(project, "add", "--quiet", "rows.csv")
    (project / "recipe" / "dvc.yaml").write_text(RECIPE)
    (project / "recipe" / "make.py").write_text(
        "import pathlib\n"
        "pathlib.Path('model', 'deep').mkdir(parents=True)\n"
        "pathlib.Path('model', 'config.json').write_text('{}')\n"
        "pathlib.Path('model', 'deep', 'w').write_text('weights')\n"
    )
    # The recipe has not run yet in the recorded commit: its dvc.lock and .gitignore come later.
    (project / ".gitignore").write_text("/.gptj8\n/recipe/model\n/rows.csv\n")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "x")
    dvc(project / "recipe", "repro", "--quiet")
    monkeypatch.chdir(project)
    return project


def tags_of(project: Path) -> dict[str, str]:
    return {
        "digest.data.train": dvc_digest(project / "rows.csv"),
        "digest.model.path": dvc_digest(project / "recipe" / "model"),
    }


def provided(nested: Path, tags: dict[str, str]) -> Path:
    """Check the last commit out and provide its inputs."""
    head = git(nested, "rev-parse", "HEAD")
    project = checkout.check_out(nested / ".gptj8" / "reproduce" / "x", head)
    assert project == nested / ".gptj8" / "reproduce" / "x" / "my models #2"
    checkout.provide_inputs(project, tags, os.environ)
    return project


@pytest.mark.parametrize("lost", [False, True], ids=["in the workspace", "only in the cache"])
def test_inputs_of_dvc_add_and_of_recipes_are_provided(nested, lost):
    tags = tags_of(nested)
    if lost:
        (nested / "rows.csv").unlink()
        shutil.rmtree(nested / "recipe" / "model")
    else:
        shutil.rmtree(nested / ".dvc" / "cache")
    project = provided(nested, tags)
    assert (project / "rows.csv").read_text() == "text,label\na,b\n"
    assert (project / "recipe" / "model" / "deep" / "w").read_text() == "weights"
    assert tags_of(project) == tags


def test_checkout_uses_the_cache_of_the_workspace_as_dvc_does(nested):
    project = provided(nested, tags_of(nested))
    assert cache_folder(project) == nested / ".dvc" / "cache"
    (project / "more.txt").write_text("more")
    dvc(project, "add", "--quiet", "more.txt")
    digest = dvc_digest(project / "more.txt")
    assert restore(digest, nested / "found.txt", nested / ".dvc" / "cache")
    assert {path.name for path in (nested / ".dvc" / "cache" / "files").iterdir()} == {"md5"}
    names = {path.name for path in (nested / ".dvc" / "cache" / "files" / "md5").iterdir()}
    assert all(len(name) == 2 for name in names)  # nothing that `dvc gc` does not see
    assert git(nested, "status", "--porcelain", "--", "rows.csv", ".dvc") == ""


def test_changed_input_comes_from_the_cache_as_it_was(nested):
    tags = tags_of(nested)
    (nested / "rows.csv").unlink()
    (nested / "rows.csv").write_text("text,label\nanother,one\n")
    project = provided(nested, tags)
    assert (project / "rows.csv").read_text() == "text,label\na,b\n"
    assert (nested / "rows.csv").read_text() == "text,label\nanother,one\n"


def test_input_comes_from_the_remote(nested, tmp_path):
    tags = tags_of(nested)
    dvc(nested, "remote", "add", "--default", "--quiet", "shared", str(tmp_path / "shared"))
    dvc(nested, "push", "--quiet", "rows.csv")
    git(nested, "commit", "-qam", "a remote")
    (nested / "rows.csv").unlink()
    digest = tags["digest.data.train"]
    (nested / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).unlink()
    project = provided(nested, tags)
    assert (project / "rows.csv").read_text() == "text,label\na,b\n"


@pytest.mark.parametrize("options", [(), ("--local",)], ids=["config", "config.local"])
def test_input_comes_from_a_remote_beside_the_project(nested, options):
    """DVC keeps a relative path in .dvc/config, and what is private in config.local."""
    tags = tags_of(nested)
    remote = ("remote", "add", *options, "--default", "--quiet", "shared", "../shared")
    dvc(nested, *remote)
    dvc(nested, "push", "--quiet", "rows.csv")
    git(nested, "commit", "-qam", "a remote", "--allow-empty")
    (nested / "rows.csv").unlink()
    digest = tags["digest.data.train"]
    (nested / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).unlink()
    project = provided(nested, tags)
    assert (project / "rows.csv").read_text() == "text,label\na,b\n"
    assert (nested / ".dvc" / "config.local").exists() == bool(options)


def test_lost_input_is_named(nested):
    tags = tags_of(nested) | {"digest.data.train": "0" * 32}
    with pytest.raises(UserError, match=r"data\.train = rows\.csv has changed since this run"):
        provided(nested, tags)
    (nested / "rows.csv").unlink()
    with pytest.raises(UserError, match=r"data\.train = rows\.csv no longer exists, and DVC's"):
        provided(nested, tags)


def test_commit_without_project_is_refused_and_nothing_is_left(nested):
    git(nested, "checkout", "-q", "--orphan", "empty")
    git(nested, "commit", "-q", "--allow-empty", "-m", "x")
    git(nested, "rm", "-rqf", "--cached", ".")
    git(nested, "commit", "-q", "--allow-empty", "-m", "nothing")
    with pytest.raises(UserError, match=r"has no dvc\.yaml in this place"):
        provided(nested, tags_of(nested))
    assert not (nested / ".gptj8" / "reproduce" / "x").exists()


def test_patch_keeps_encodings_and_line_ends(nested, tmp_path):
    file = nested / "old.csv"
    file.write_bytes("text,label\r\nnaïve,b\r\n".encode("latin-1"))
    git(nested, "add", "old.csv")
    git(nested, "commit", "-qm", "a file from Windows")
    changed = "text,label\r\nnaïve,b\r\ncafé,d\r\n".encode("latin-1")
    file.write_bytes(changed)
    patch = tmp_path / "changes.diff"
    patch.write_bytes(lineage.changes(nested).encode(errors="surrogateescape"))
    git(nested, "checkout", "--", "old.csv")
    git(nested.parent, "apply", str(patch))
    assert file.read_bytes() == changed


@pytest.mark.parametrize("setting", ["noprefix", "mnemonicPrefix", "relative"])
def test_patch_does_not_depend_on_how_the_user_likes_diffs(nested, tmp_path, setting):
    git(nested, "config", f"diff.{setting}", "true")
    (nested / "dvc.yaml").write_text("stages: {}\n# changed\n")
    patch = tmp_path / "changes.diff"
    patch.write_text(lineage.changes(nested))
    git(nested, "checkout", "--", "dvc.yaml")
    git(nested.parent, "apply", str(patch))
    assert (nested / "dvc.yaml").read_text() == "stages: {}\n# changed\n"


def test_command_of_a_project_in_a_subfolder_overrides_its_params(nested):
    content = "data: {train: rows.csv}\nmodel: {path: recipe/model}\nseed: 5\n"
    (nested / "params.yaml").write_text(content)
    head = git(nested, "rev-parse", "HEAD")
    command = lineage.reproducing_command(nested, head)
    assert command == f"git checkout {head} && dvc exp run -S seed=5"


def whole_project(folder: Path, model: Path) -> Clone:
    """A project in a subfolder whose rows are tracked by `dvc add` and whose model has a recipe."""
    clone = Clone(folder / "clone", model)
    top = folder / "Größe # 1"
    top.mkdir()
    shutil.rmtree(clone.folder / ".git")
    clone.folder = clone.folder.rename(top / "my models #2")
    recipe = clone.folder / "data" / "models" / "made"
    recipe.mkdir()
    (clone.folder / "models" / "tiny").rename(folder / "tiny")
    (recipe / "dvc.yaml").write_text(RECIPE)
    (recipe / "make.py").write_text(
        "import shutil\n"
        f"with open({str(folder / 'made')!r}, 'a') as log: log.write('made\\n')\n"
        f"shutil.copytree({str(folder / 'tiny')!r}, 'model')\n"
    )
    (recipe / ".gitignore").write_text("/model\n")
    clone.edit_params(model={"path": "data/models/made/model"})
    clone.git("init", "-q", "-b", "trunk", cwd=top)
    dvc(clone.folder, "add", "--quiet", "rows.csv")
    clone.git("add", "-A")
    clone.git("commit", "-qm", "x")
    return clone


@pytest.mark.slow
def test_run_is_reproduced_from_a_subfolder_with_lost_inputs(tmp_path, tiny_model_dir):
    clone = whole_project(tmp_path, tiny_model_dir)
    process = clone.dvc("exp", "run", "finetune", "-S", "finetune.r=2")
    assert process.returncode == 0, process.stdout + process.stderr
    (run,) = clone.runs().values()
    (clone.folder / "rows.csv").unlink()
    shutil.rmtree(clone.folder / "data" / "models" / "made" / "model")
    clone.git("checkout", "--", ".")
    command = [sys.executable, "-m", "gptj8.commands.main", "reproduce", run.info.run_id]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, cwd=clone.folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "is reproduced: the adapter is byte-identical" in process.stdout
    assert (tmp_path / "made").read_text() == "made\n"  # the recipe ran once, for the run itself
    objects = clone.folder / ".dvc" / "cache" / "files" / "md5"
    assert all(len(path.name) == 2 for path in objects.iterdir())
    assert len(clone.runs()) == 1  # a reproduction is no run of its own
    assert not list((clone.folder / ".gptj8" / "reproduce").iterdir())
    lock = YAML(typ="safe").load((clone.folder / "params.yaml").read_text())
    assert lock["finetune"]["r"] == 8
