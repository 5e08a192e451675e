"""A machine that lacks what most have: HOME, room for temporary files, shared memory."""

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
        ("no variable but PATH", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stages_run_all_the_same(
    undisturbed, tmp_path, monkeypatch, tally, stage, lacks, environment
):
    project = undisturbed.copy(tmp_path / "project")
    if environment is None:
        for name in set(os.environ) - {"PATH"}:
            monkeypatch.delenv(name)
    process = project.run(stage, **(environment or {}))
    held = process.returncode == 0 and project.outcome() == undisturbed.outcome()
    tally(lacks, held)
    assert held, process.stderr


def mounted(options: str, folder: str) -> list[str]:
    """Return the beginning of a command that has an empty file system of its own at a folder."""
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, folder]


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lacks", ["no /dev/shm", "TMPDIR of 64 KB on another file system"])
def test_stages_run_with_file_systems_of_no_use(undisturbed, tmp_path, tally, stage, lacks):
    project = undisturbed.copy(tmp_path / "project")
    if lacks == "no /dev/shm":
        process = project.run(stage, prefix=mounted("ro", "/dev/shm"))
    else:
        tiny = tmp_path / "tiny"
        tiny.mkdir()
        process = project.run(stage, prefix=mounted("size=64k", str(tiny)), TMPDIR=str(tiny))
    held = process.returncode == 0 and project.outcome() == undisturbed.outcome()
    tally(lacks, held)
    assert held, process.stderr
