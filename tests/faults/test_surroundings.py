"""A machine that lacks what most have: HOME, room for temporary files, a tracking database."""

from __future__ import annotations

import os

import pytest

from tests.project_clone import STAGES


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
