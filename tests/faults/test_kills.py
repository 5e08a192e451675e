"""A stage that is killed, or told to end, at any moment: the next run ends as an undisturbed one.

Kills come at chosen changes of the disk, half of them in saving, renaming and removing, and at
random times. No hand is laid on anything between the two runs.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.conftest import faults
from tests.faults.stage_project import StageProject
from tests.helpers.project_clone import STAGES

_OUTPUTS = {
    "validate": ["artifacts/dataset", "reports/validate"],
    "convert": ["artifacts/base-8bit", "reports/convert"],
    "finetune": ["artifacts/adapter", "reports/finetune"],
    "evaluate": ["reports/evaluate"],
    "export": ["artifacts/export", "reports/export"],
}
_DECISIVE = ("rename", "remove", "fsync")


@pytest.fixture(scope="module")
def project(undisturbed, tmp_path_factory):
    return undisturbed.copy(tmp_path_factory.mktemp("killed") / "project")


def remove_outputs(project: StageProject, stage: str) -> None:
    """Do what DVC does before it runs a stage."""
    for output in _OUTPUTS[stage]:
        shutil.rmtree(project.folder / output, ignore_errors=True)


def problems_after(project: StageProject, undisturbed: StageProject, stage: str) -> list[str]:
    """Run a stage again and return what is not as if nothing had happened."""
    process = project.run(stage)
    if process.returncode != 0:
        return [f"the next run ends with {process.returncode}: {process.stderr}"]
    found, wanted = project.outcome(), undisturbed.outcome()
    problems = [f"{name} differs" for name in wanted if found.get(name) != wanted[name]]
    problems += [f"{name} is left over" for name in project.left_over()]
    states = project.folder / ".gptj8" / "checkpoints"
    problems += [f"{path.name} is kept" for path in states.glob("*") if path.is_dir()]
    return problems


def settle(tally, fault, problems, project, undisturbed):
    """Count a trial; after one that failed the next one begins with a whole project again."""
    tally(fault, not problems)
    if problems:
        shutil.rmtree(project.folder)
        shutil.copytree(undisturbed.folder, project.folder)
    return problems


def kill_at(project, undisturbed, changes, shim, stage, draw):
    """Kill a stage at one of its changes and return what the next run does not mend."""
    known = changes(stage)
    decisive = [n for n, line in enumerate(known, 1) if line.split()[0] in _DECISIVE]
    at = draw.choice(decisive) if draw.random() < 0.5 else draw.randrange(1, len(known) + 1)
    if draw.random() < 0.5:
        remove_outputs(project, stage)
    process = project.run(stage, **faults(shim, project, stage, "kill", at))
    # Fewer changes where there are no outputs to replace: then it may come to its end.
    assert process.returncode in (-signal.SIGKILL, 0), process.stderr
    return problems_after(project, undisturbed, stage)


def kill_after(project, stage, seconds, number):
    """Send a signal after some time; return how the stage ended, and what it said."""
    process = project.start(stage)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def durations(undisturbed, tmp_path_factory):
    """How long each stage takes."""
    project = undisturbed.copy(tmp_path_factory.mktemp("timed") / "project")
    found = {}
    for stage in STAGES:
        begun = time.monotonic()
        assert project.run(stage).returncode == 0
        found[stage] = time.monotonic() - begun
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    project, undisturbed, changes, shim, tally, stage
):
    problems = kill_at(project, undisturbed, changes, shim, stage, random.Random(stage))
    assert not settle(tally, "SIGKILL in a stage", problems, project, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(10))
def test_every_one_of_many_kills_is_survived(
    project, undisturbed, changes, shim, durations, tally, part
):
    draw, failed = random.Random(part), []
    for trial in range(20):
        stage = STAGES[trial % len(STAGES)]
        if trial < 15:
            fault = "SIGKILL while a stage changes files"
            problems = kill_at(project, undisturbed, changes, shim, stage, draw)
        else:
            fault = "SIGKILL at a random time"
            seconds = draw.uniform(0.1, durations[stage])
            kill_after(project, stage, seconds, signal.SIGKILL)
            problems = problems_after(project, undisturbed, stage)
        failed += settle(tally, fault, problems, project, undisturbed)
    assert not failed, "\n".join(failed)


def told_to_end(project, undisturbed, stage, number, seconds):
    """Send SIGINT or SIGTERM and return what is not clean."""
    code, said = kill_after(project, stage, seconds, number)
    problems = []
    # By the signal itself: it came when all was done, and Python had put its handlers away.
    if code not in (128 + number, -number, 0):
        problems.append(f"{stage} ends with {code} after {seconds:.1f} s")
    if "Traceback" in said:
        problems.append(f"{stage} after {seconds:.1f} s: {said}")
    problems += [f"{name} is left behind" for name in project.left_over()]
    return problems + problems_after(project, undisturbed, stage), code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_training_that_is_told_to_end_is_kept(project, undisturbed, tally, number):
    process = project.start("finetune")
    states = project.folder / ".gptj8" / "checkpoints"
    while process.poll() is None and not any(states.glob("*/step-*")):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "is kept" in out and "Traceback" not in err
    assert any(states.glob("*/step-*"))
    problems = problems_after(project, undisturbed, "finetune")
    assert not settle(tally, f"{number.name} in training", problems, project, undisturbed)


@pytest.mark.faults
def test_every_stage_that_is_told_to_end_ends_clean(project, undisturbed, durations, tally):
    draw = random.Random(1)
    failed = []
    for trial in range(50):
        stage = STAGES[trial % len(STAGES)]
        number = (signal.SIGINT, signal.SIGTERM)[trial // len(STAGES) % 2]
        # From a fifth of a second on: before, Python itself begins, and knows of no handler.
        seconds = draw.uniform(0.2, durations[stage])
        problems, _ = told_to_end(project, undisturbed, stage, number, seconds)
        fault = "SIGINT or SIGTERM at a random time"
        failed += settle(tally, fault, problems, project, undisturbed)
    assert not failed, "\n".join(failed)
