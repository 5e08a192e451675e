"""Digests of files and folders equal those of DVC, including the effect of .dvcignore."""

import hashlib
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from gptj8.runtime.dvc_digests import dvc_digest, dvc_files

TREE = {
    "data/a.csv": "a",
    "data/code/b.py": "b",
    "data/code/kernels.so": "binary",
    "data/code/__pycache__/b.pyc": "compiled",
    "data/code/keep/__pycache__.txt": "not a folder",
    "data/logs/1.log": "ignored",
    "data/logs/kept.log": "negated",
    "data/ümlaut and space.csv": "u",
    ".dvcignore": "*.so\n__pycache__\n*.log\n!kept.log\n/data/only-here\n",
    "data/only-here/e.csv": "anchored",
    "data/code/only-here/f.csv": "not anchored there",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests")
    for name, content in TREE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "linked.csv").write_text("linked")
    (folder / "data" / "folder").symlink_to(elsewhere)
    (folder / "data" / "file.csv").symlink_to(elsewhere / "linked.csv")
    (folder / "dvc.yaml").write_text("stages: {watch: {cmd: 'true', deps: [data]}}")
    for command in ("init --no-scm", "repro"):
        arguments = [sys.executable, "-m", "dvc", *command.split()]
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    return folder


def test_a_folders_digest_equals_the_one_in_dvc_lock(project, monkeypatch):
    locked = YAML(typ="safe").load((project / "dvc.lock").read_text())["stages"]["watch"]
    (dep,) = locked["deps"]
    assert dvc_digest(project / "data") == dep["md5"]
    assert len(dvc_files(project / "data")) == dep["nfiles"]
    monkeypatch.chdir(project)
    assert dvc_digest("data") == dep["md5"]


def test_ignored_files_are_not_listed(project):
    seen = {file.relative_to(project).as_posix() for file in dvc_files(project / "data")}
    ignored = {"data/code/kernels.so", "data/code/__pycache__/b.pyc", "data/logs/1.log"}
    ignored |= {"data/only-here/e.csv"}
    given = {name for name in TREE if name.startswith("data/")}
    assert seen == given - ignored | {"data/file.csv"}


def test_an_ignored_file_does_not_change_the_digest(project):
    before = dvc_digest(project / "data")
    (project / "data" / "code" / "other.so").write_text("from another machine")
    assert dvc_digest(project / "data") == before
    (project / "data" / "code" / "b.py").write_text("b2")
    assert dvc_digest(project / "data") != before


def test_a_staging_folder_has_the_same_digest_as_the_final_folder(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvcignore").write_text("*.incomplete\n")
    (tmp_path / ".out.incomplete" / "sub").mkdir(parents=True)
    (tmp_path / ".out.incomplete" / "sub" / "x").write_text("x")
    before = dvc_digest(tmp_path / ".out.incomplete")
    (tmp_path / ".out.incomplete").rename(tmp_path / "out")
    assert dvc_digest(tmp_path / "out") == before


def test_a_folders_digest_depends_only_on_names_and_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x").write_text("x")
        (tmp_path / folder / "y").write_text("y")
    assert dvc_digest(tmp_path / "a") == dvc_digest(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert dvc_digest(tmp_path / "a") != dvc_digest(tmp_path / "b")


def test_cached_digests_are_used_until_the_file_changes(tmp_path):
    data, known = tmp_path / "data", {}
    data.write_text("one")
    first = dvc_digest(data, known)
    assert list(known.values()) == [first] == [hashlib.md5(b"one").hexdigest()]
    known[next(iter(known))] = "remembered"
    assert dvc_digest(data, known) == "remembered"
    data.write_text("three")  # another size, so the entry no longer applies
    assert dvc_digest(data, known) == dvc_digest(data) == hashlib.md5(b"three").hexdigest()
