"""Test that the run after a killed or interrupted stage gives the same outputs as without a fault.

Stages are killed at chosen file changes, half of them renames, removals and fsyncs, and at random
times. Nothing is repaired manually between the two runs.
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
def project(reference, tmp_path_factory):
    return reference.copy(tmp_path_factory.mktemp("killed") / "project")


def remove_outputs(project: StageProject, stage: str) -> None:
    """Remove a stage's outputs, as DVC does before it runs the stage."""
    for output in _OUTPUTS[stage]:
        shutil.rmtree(project.folder / output, ignore_errors=True)


def problems_after(project: StageProject, reference: StageProject, stage: str) -> list[str]:
    """Rerun a stage and return the differences from the outputs without faults."""
    process = project.run(stage)
    if process.returncode != 0:
        return [f"the next run exits with {process.returncode}: {process.stderr}"]
    found, wanted = project.outcome(), reference.outcome()
    problems = [f"{name} differs" for name in wanted if found.get(name) != wanted[name]]
    problems += [f"{name} is left over" for name in project.leftovers()]
    states = project.folder / ".gptj8" / "checkpoints"
    problems += [f"{path.name} is kept" for path in states.glob("*") if path.is_dir()]
    return problems


def count_trial(tally, fault, problems, project, reference):
    """Count a trial, and restore the project if the trial failed."""
    tally(fault, not problems)
    if problems:
        shutil.rmtree(project.folder)
        shutil.copytree(reference.folder, project.folder)
    return problems


def kill_at(project, reference, changes, shim, stage, draw):
    """Kill a stage at one of its changes and return the problems that remain after the next run."""
    known = changes(stage)
    decisive = [n for n, line in enumerate(known, 1) if line.split()[0] in _DECISIVE]
    at = draw.choice(decisive) if draw.random() < 0.5 else draw.randrange(1, len(known) + 1)
    if draw.random() < 0.5:
        remove_outputs(project, stage)
    process = project.run(stage, **faults(shim, project, stage, "kill", at))
    # Without outputs to replace there are fewer changes, so the stage may finish.
    assert process.returncode in (-signal.SIGKILL, 0), process.stderr
    return problems_after(project, reference, stage)


def kill_after(project, stage, seconds, number):
    """Send a signal after some seconds; return the stage's exit code and output."""
    process = project.start(stage)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def durations(reference, tmp_path_factory):
    """Seconds per stage."""
    project = reference.copy(tmp_path_factory.mktemp("timed") / "project")
    found = {}
    for stage in STAGES:
        begun = time.monotonic()
        assert project.run(stage).returncode == 0
        found[stage] = time.monotonic() - begun
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_stage_can_be_rerun(project, reference, changes, shim, tally, stage):
    problems = kill_at(project, reference, changes, shim, stage, random.Random(stage))
    assert not count_trial(tally, "SIGKILL in a stage", problems, project, reference)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(10))
def test_many_kills_are_survived(project, reference, changes, shim, durations, tally, part):
    draw, failed = random.Random(part), []
    for trial in range(20):
        stage = STAGES[trial % len(STAGES)]
        if trial < 15:
            fault = "SIGKILL while a stage changes files"
            problems = kill_at(project, reference, changes, shim, stage, draw)
        else:
            fault = "SIGKILL at a random time"
            seconds = draw.uniform(0.1, durations[stage])
            kill_after(project, stage, seconds, signal.SIGKILL)
            problems = problems_after(project, reference, stage)
        failed += count_trial(tally, fault, problems, project, reference)
    assert not failed, "\n".join(failed)


def problems_after_signal(project, reference, stage, number, seconds):
    """Send SIGINT or SIGTERM and return the problems found and the exit code."""
    code, output = kill_after(project, stage, seconds, number)
    problems = []
    # -number: the signal came after Python had removed its handlers at exit.
    if code not in (128 + number, -number, 0):
        problems.append(f"{stage} exits with {code} after {seconds:.1f} s")
    if "Traceback" in output:
        problems.append(f"{stage} after {seconds:.1f} s: {output}")
    problems += [f"{name} is left behind" for name in project.leftovers()]
    return problems + problems_after(project, reference, stage), code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupted_training_saves_a_checkpoint(project, reference, tally, number):
    process = project.start("finetune")
    states = project.folder / ".gptj8" / "checkpoints"
    while process.poll() is None and not any(states.glob("*/step-*")):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "saved a checkpoint after step" in out and "Traceback" not in err
    assert any(states.glob("*/step-*"))
    problems = problems_after(project, reference, "finetune")
    assert not count_trial(tally, f"{number.name} in training", problems, project, reference)


@pytest.mark.faults
def test_interrupted_stages_exit_cleanly(project, reference, durations, tally):
    draw = random.Random(1)
    failed = []
    for trial in range(50):
        stage = STAGES[trial % len(STAGES)]
        number = (signal.SIGINT, signal.SIGTERM)[trial // len(STAGES) % 2]
        # Not in the first 0.2 seconds, while Python starts and has no handlers.
        seconds = draw.uniform(0.2, durations[stage])
        problems, _ = problems_after_signal(project, reference, stage, number, seconds)
        fault = "SIGINT or SIGTERM at a random time"
        failed += count_trial(tally, fault, problems, project, reference)
    assert not failed, "\n".join(failed)
