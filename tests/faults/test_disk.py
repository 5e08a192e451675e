"""A disk that is full, read-only or failing at any write: one line, and what was there stays."""

from __future__ import annotations

import errno
import random
import shutil

import pytest

from tests.faults.conftest import faults
from tests.helpers.project_clone import STAGES

_TAKES_SPACE = ("write", "create", "truncate", "allocate")
_PARTS = 5
_WORDS = {errno.ENOSPC: "no space left", errno.EROFS: "read-only", errno.EIO: "input/output error"}


@pytest.fixture(scope="module")
def project(undisturbed, tmp_path_factory):
    return undisturbed.copy(tmp_path_factory.mktemp("full") / "project")


def writes_of(changes, stage):
    """Return the numbers of the writes of a stage, as the shim counts them."""
    kinds = [line.split()[0] for line in changes(stage)]
    return range(1, sum(kind in _TAKES_SPACE for kind in kinds) + 1)


def problems_at(project, undisturbed, shim, stage, at, error):
    """Let nothing be written from a write on; return what does not hold."""
    process = project.run(stage, **faults(shim, project, stage, "fail", at, error))
    wanted = undisturbed.outcome()
    problems = []
    if process.returncode not in (0, 2):  # 0: what could not be written was not needed
        problems.append(f"{stage} at write {at} ends with {process.returncode}: {process.stderr}")
    if process.returncode == 2 and not (
        process.stderr.startswith("error: ") or "\nerror: " in process.stderr
    ):
        problems.append(f"{stage} at write {at} says {process.stderr!r}")
    if process.returncode == 2 and _WORDS[error] not in process.stderr.lower():
        problems.append(f"{stage} at write {at} does not say why: {process.stderr!r}")
    if "Traceback" in process.stderr:
        problems.append(f"{stage} at write {at}: {process.stderr}")
    # The same bytes whether they are those of before or were written anew.
    found = project.outcome()
    problems += [
        f"write {at}: {name} is lost" for name in wanted if found.get(name) != wanted[name]
    ]
    problems += [f"write {at}: {name} is left behind" for name in project.left_over()]
    return problems


def tried(project, undisturbed, changes, shim, tally, stage, numbers, error, fault):
    failed = []
    for at in numbers:
        problems = problems_at(project, undisturbed, shim, stage, at, error)
        tally(fault, not problems)
        if problems:
            failed += problems
            shutil.rmtree(project.folder)
            shutil.copytree(undisturbed.folder, project.folder)
        # States of a training that was ended are for the next one, and not for this.
        shutil.rmtree(project.folder / ".gptj8" / "checkpoints", ignore_errors=True)
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_loses_nothing(project, undisturbed, changes, shim, tally, stage):
    numbers = random.Random(stage).sample(writes_of(changes, stage), 1)
    fault = "disk full"
    assert not tried(
        project, undisturbed, changes, shim, tally, stage, numbers, errno.ENOSPC, fault
    )


@pytest.mark.faults
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_at_any_write_loses_nothing(
    project, undisturbed, changes, shim, tally, stage, part
):
    numbers = writes_of(changes, stage)[part::_PARTS]
    fault = f"disk full at a write of {stage}"
    assert not tried(
        project, undisturbed, changes, shim, tally, stage, numbers, errno.ENOSPC, fault
    )


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO], ids=["read-only", "failing"])
def test_other_disks_that_cannot_be_written(
    project, undisturbed, changes, shim, tally, stage, error
):
    numbers = sorted(random.Random(1).sample(writes_of(changes, stage), 4))
    fault = "disk read-only" if error == errno.EROFS else "disk that fails"
    assert not tried(project, undisturbed, changes, shim, tally, stage, numbers, error, fault)
