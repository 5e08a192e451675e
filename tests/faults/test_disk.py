"""Test full, read-only and failing disks: a one-line error, and existing files do not change."""

from __future__ import annotations

import errno
import random
import shutil

import pytest

from tests.faults.conftest import faults
from tests.helpers.project_clone import STAGES

_TAKES_SPACE = ("write", "create", "truncate", "allocate")
_PARTS = 5
_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EROFS: "read-only",
    errno.EIO: "input/output error",
}


@pytest.fixture(scope="module")
def project(reference, tmp_path_factory):
    return reference.copy(tmp_path_factory.mktemp("full") / "project")


def writes_of(changes, stage):
    """Return the numbers of a stage's writes, as counted by the shim."""
    kinds = [line.split()[0] for line in changes(stage)]
    return range(1, sum(kind in _TAKES_SPACE for kind in kinds) + 1)


def problems_at(project, reference, shim, stage, at, error):
    """Make all writes fail from number `at` on, and return the problems found."""
    process = project.run(stage, **faults(shim, project, stage, "fail", at, error))
    wanted = reference.outcome()
    problems = []
    if process.returncode not in (0, 2):  # 0: the failed write was optional
        problems.append(f"{stage} at write {at} exits with {process.returncode}: {process.stderr}")
    if process.returncode == 2 and not (
        process.stderr.startswith("error: ") or "\nerror: " in process.stderr
    ):
        problems.append(f"{stage} at write {at} prints {process.stderr!r}")
    if process.returncode == 2 and _REASONS[error] not in process.stderr.lower():
        problems.append(f"{stage} at write {at} prints no reason: {process.stderr!r}")
    if "Traceback" in process.stderr:
        problems.append(f"{stage} at write {at}: {process.stderr}")
    # Outputs are byte-identical whether they are the old ones or were rewritten.
    found = project.outcome()
    problems += [
        f"write {at}: {name} is lost" for name in wanted if found.get(name) != wanted[name]
    ]
    problems += [f"write {at}: {name} is left behind" for name in project.leftovers()]
    return problems


def failures_at(project, reference, changes, shim, tally, stage, numbers, error, fault):
    failed = []
    for at in numbers:
        problems = problems_at(project, reference, shim, stage, at, error)
        tally(fault, not problems)
        if problems:
            failed += problems
            shutil.rmtree(project.folder)
            shutil.copytree(reference.folder, project.folder)
        # The next trial must not resume from the checkpoints of this one.
        shutil.rmtree(project.folder / ".gptj8" / "checkpoints", ignore_errors=True)
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_loses_no_data(project, reference, changes, shim, tally, stage):
    numbers = random.Random(stage).sample(writes_of(changes, stage), 1)
    fault = "disk full"
    assert not failures_at(
        project, reference, changes, shim, tally, stage, numbers, errno.ENOSPC, fault
    )


@pytest.mark.faults
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_at_any_write_loses_no_data(
    project, reference, changes, shim, tally, stage, part
):
    numbers = writes_of(changes, stage)[part::_PARTS]
    fault = f"disk full at a write of {stage}"
    assert not failures_at(
        project, reference, changes, shim, tally, stage, numbers, errno.ENOSPC, fault
    )


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO], ids=["read-only", "failing"])
def test_read_only_and_failing_disks(project, reference, changes, shim, tally, stage, error):
    numbers = sorted(random.Random(1).sample(writes_of(changes, stage), 4))
    fault = "disk read-only" if error == errno.EROFS else "disk failing"
    assert not failures_at(project, reference, changes, shim, tally, stage, numbers, error, fault)
