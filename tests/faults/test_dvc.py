"""`dvc repro` itself, killed with all its processes, and twice at once: no hand is laid on it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.stage_project import outcome_of
from tests.helpers.project_clone import Clone


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    clone = Clone(tmp_path_factory.mktemp("dvc") / "project", tiny_model_dir)
    clone.edit_params(finetune={"save_minutes": 0, "lora_dropout": 0.1})
    return clone


@pytest.fixture(scope="module")
def undisturbed_outcome(clone):
    process = clone.dvc("repro", "--no-run-cache")
    assert process.returncode == 0, process.stdout + process.stderr
    return outcome_of(clone.folder)


def forget(clone: Clone) -> None:
    """Let everything run again."""
    (clone.folder / "dvc.lock").unlink(missing_ok=True)


def start(clone: Clone) -> subprocess.Popen:
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--no-run-cache"],
        cwd=clone.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rerun_problems(clone, wanted):
    process = clone.dvc("repro", "--no-run-cache")
    if process.returncode:
        return [process.stdout + process.stderr], ""
    found = outcome_of(clone.folder)
    return [name for name in wanted if found.get(name) != wanted[name]], process.stdout


@pytest.mark.faults
def test_a_killed_pipeline_goes_on_in_the_midst_of_training(clone, undisturbed_outcome, tally):
    forget(clone)
    process = start(clone)
    states = clone.folder / ".gptj8" / "checkpoints"
    while process.poll() is None and not any(states.glob("*/step-*5")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    problems, said = rerun_problems(clone, undisturbed_outcome)
    tally("SIGKILL of dvc repro and all it started", not problems)
    assert not problems
    assert "finetune: goes on after step " in said


@pytest.mark.faults
def test_a_killed_pipeline_is_run_again_from_any_moment(clone, undisturbed_outcome, tally):
    draw, failed = random.Random(4), []
    for _ in range(8):
        forget(clone)
        process = start(clone)
        try:
            process.wait(draw.uniform(1, 40))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        problems, _ = rerun_problems(clone, undisturbed_outcome)
        tally("SIGKILL of dvc repro and all it started", not problems)
        failed += problems
    assert not failed


@pytest.mark.faults
def test_of_two_at_once_one_refuses(clone, undisturbed_outcome, tally):
    forget(clone)
    first = start(clone)
    time.sleep(8)
    second = start(clone)
    said = second.communicate(timeout=600)[0]
    first_said = first.communicate(timeout=600)[0]
    assert first.returncode == 0, first_said
    found = outcome_of(clone.folder)
    held = second.returncode != 0 and "lock" in said and found == undisturbed_outcome
    tally("two dvc repro at once", held)
    assert held, said
