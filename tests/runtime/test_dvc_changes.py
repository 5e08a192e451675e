"""The reasons why a stage runs, derived from dvc.lock."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptj8.runtime import dvc_changes
from gptj8.runtime.dvc_changes import FIRST, FIRST_IN_COPY, NOT_MADE, explain
from gptj8.runtime.dvc_digests import dvc_digest

STAGE = {
    "cmd": "python -m stages.train",
    "deps": ["code.py", "${data.train}", "${data.test}/.", "made"],
    "params": ["seed", "train"],
}
PARAMS = {"seed": 0, "train": {"r": 8, "warm": None}, "data": {"train": "rows", "test": None}}


def write_yaml(path: Path, content: object) -> None:
    with open(path, "w") as stream:
        YAML(typ="safe").dump(content, stream)


def entry(folder: Path, path: str) -> dict[str, object]:
    file = folder / path
    size = {"size": sum(f.stat().st_size for f in file.rglob("*"))} if file.is_dir() else {}
    count = {"nfiles": len(list(file.iterdir()))} if file.is_dir() else {}
    size = size or {"size": file.stat().st_size}
    return {"path": path, "hash": "md5", "md5": dvc_digest(file), **size, **count}


@pytest.fixture
def project(tmp_path):
    """Return a project whose stage has just run."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("a")
    (tmp_path / "code.py").write_text("x = 1")
    (tmp_path / "None").write_text("")
    write_yaml(tmp_path / "params.yaml", PARAMS)
    write_yaml(tmp_path / "dvc.yaml", {"stages": {"train": STAGE}})
    made = {"path": "made", "hash": "md5", "md5": "1.dir", "size": 1, "nfiles": 1}
    lock(tmp_path, made, [made])
    return tmp_path


def lock(folder: Path, made: dict[str, object], outs: list[dict[str, object]]) -> None:
    deps = [entry(folder, "code.py"), entry(folder, "rows")]
    deps += [{**entry(folder, "None"), "path": "None/."}, made]
    params = {"params.yaml": {"seed": 0, "train": {"r": 8, "warm": None}}}
    stage = {"cmd": STAGE["cmd"], "deps": deps, "params": params}
    stages = {"train": stage, "make": {"cmd": "true", "outs": outs}}
    write_yaml(folder / "dvc.lock", {"schema": "2.0", "stages": stages})


def test_a_stage_without_a_lock_entry_is_a_first_run(tmp_path, project):
    assert explain("evaluate", project) == FIRST
    (project / "dvc.lock").unlink()
    assert explain("train", project) == FIRST


def test_a_recipe_that_has_not_run_is_a_first_run(tmp_path):
    write_yaml(tmp_path / "dvc.yaml", {"stages": {"fetch": {"cmd": "python fetch.py"}}})
    write_yaml(tmp_path / "dvc.lock", {"schema": "2.0", "stages": {"fetch": {"cmd": NOT_MADE}}})
    assert explain("fetch", tmp_path) == FIRST


def test_an_experiments_copy_without_a_lock_is_a_first_run(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert explain("train") == FIRST_IN_COPY


def test_ignored_files_are_not_a_reason(project):
    (project / ".dvc").mkdir()
    (project / ".dvcignore").write_text("__pycache__\n*.so\n")
    for name in ("__pycache__/a.pyc", "kernels.so"):
        (project / "rows" / name).parent.mkdir(exist_ok=True)
        (project / "rows" / name).write_text("compiled here")
    assert explain("train", project).startswith("rerun: forced, or its outputs were changed")
    (project / "rows" / "b.csv").write_text("b")
    assert explain("train", project) == "runs because rows changed"


def test_without_changes_the_stage_was_forced(project):
    assert explain("train", project).startswith("rerun: forced, or its outputs were changed")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "seed is 1 (was 0)"),
        ({"train": {"r": 4, "warm": None}}, "train.r is 4 (was 8)"),
        ({"train": {"r": 8, "warm": 0.5}}, "train.warm is 0.5 (was null)"),
        ({"train": {"r": 8}}, "train.warm was removed (was null)"),
        ({"train": {"r": 8, "warm": None, "k": True}}, "train.k is true (was not set)"),
    ],
    ids=str,
)
def test_changed_params_are_shown_with_old_and_new_values(project, change, reason):
    write_yaml(project / "params.yaml", PARAMS | change)
    assert explain("train", project) == f"runs because {reason}"


def test_changed_files_are_named(project):
    (project / "code.py").write_text("x = 2")
    assert explain("train", project) == "runs because code.py changed"
    (project / "rows" / "a.csv").write_text("b")
    assert explain("train", project) == "runs because code.py changed, rows changed"


def test_outputs_of_other_stages_are_compared_by_their_lock_entries(project):
    before = {"path": "made", "hash": "md5", "md5": "1.dir", "size": 1, "nfiles": 1}
    lock(project, before, [{**before, "md5": "2.dir"}])
    assert explain("train", project) == "runs because made changed"


def test_added_and_removed_dependencies_are_named(project):
    (project / "mine").write_text("")
    data = {"data": {"train": "mine", "test": None}}
    write_yaml(project / "params.yaml", PARAMS | data)
    assert "mine is a new dependency" in explain("train", project)
    assert "rows is no longer a dependency" in explain("train", project)


def test_folders_too_large_to_hash_are_possible_changes(project, monkeypatch):
    monkeypatch.setattr(dvc_changes, "_MOST_BYTES", 0)
    assert "or something in rows changed" in explain("train", project)
    (project / "rows" / "a.csv").write_text("longer")
    assert "rows changed" in explain("train", project)


def test_many_changes_are_counted(project):
    write_yaml(project / "params.yaml", PARAMS | {"seed": 5, "train": {"a": 1, "b": 2, "r": 8}})
    assert explain("train", project).endswith("train.b is 2 (was not set) and 1 more")


def test_an_unreadable_project_does_not_raise(project):
    (project / "dvc.lock").write_text("{")
    assert explain("train", project) == "runs"
