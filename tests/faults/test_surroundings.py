"""Test machines without HOME, space for temporary files or shared memory."""

from __future__ import annotations

import os

import pytest

from tests.helpers.project_clone import STAGES


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("lacks", "environment"),
    [
        ("HOME is a folder that does not exist", {"HOME": "/nonexistent"}),
        ("HOME is empty", {"HOME": ""}),
        ("TMPDIR does not exist", {"TMPDIR": "/nonexistent"}),
        ("only PATH is set", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stages_run_without_environment_variables(
    reference, tmp_path, monkeypatch, tally, stage, lacks, environment
):
    project = reference.copy(tmp_path / "project")
    if environment is None:
        for name in set(os.environ) - {"PATH"}:
            monkeypatch.delenv(name)
    process = project.run(stage, **(environment or {}))
    survived = process.returncode == 0 and project.outcome() == reference.outcome()
    tally(lacks, survived)
    assert survived, process.stderr


def mounted(options: str, folder: str) -> list[str]:
    """Return a command prefix that mounts an empty file system at a folder."""
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, folder]


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lacks", ["no /dev/shm", "TMPDIR of 64 KB on another file system"])
def test_stages_run_with_unusable_file_systems(reference, tmp_path, tally, stage, lacks):
    project = reference.copy(tmp_path / "project")
    if lacks == "no /dev/shm":
        process = project.run(stage, prefix=mounted("ro", "/dev/shm"))
    else:
        tiny = tmp_path / "tiny"
        tiny.mkdir()
        process = project.run(stage, prefix=mounted("size=64k", str(tiny)), TMPDIR=str(tiny))
    survived = process.returncode == 0 and project.outcome() == reference.outcome()
    tally(lacks, survived)
    assert survived, process.stderr
