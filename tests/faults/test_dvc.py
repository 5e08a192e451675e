"""Test that `dvc repro` works without manual repair after all its processes are killed.

Also tests that a second `dvc repro` at the same time is rejected.
"""

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
def reference_outcome(clone):
    process = clone.dvc("repro", "--no-run-cache")
    assert process.returncode == 0, process.stdout + process.stderr
    return outcome_of(clone.folder)


def forget(clone: Clone) -> None:
    """Remove dvc.lock, so that all stages rerun."""
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
def test_killed_pipeline_resumes_training(clone, reference_outcome, tally):
    forget(clone)
    process = start(clone)
    states = clone.folder / ".gptj8" / "checkpoints"
    while process.poll() is None and not any(states.glob("*/step-*5")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    problems, output = rerun_problems(clone, reference_outcome)
    tally("SIGKILL of dvc repro and its processes", not problems)
    assert not problems
    assert "finetune: resuming after step " in output


@pytest.mark.faults
def test_pipeline_killed_at_a_random_time_can_be_rerun(clone, reference_outcome, tally):
    draw, failed = random.Random(4), []
    for _ in range(8):
        forget(clone)
        process = start(clone)
        try:
            process.wait(draw.uniform(1, 40))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        problems, _ = rerun_problems(clone, reference_outcome)
        tally("SIGKILL of dvc repro and its processes", not problems)
        failed += problems
    assert not failed


@pytest.mark.faults
def test_second_of_two_concurrent_runs_fails(clone, reference_outcome, tally):
    forget(clone)
    first = start(clone)
    time.sleep(8)
    second = start(clone)
    second_output = second.communicate(timeout=600)[0]
    first_output = first.communicate(timeout=600)[0]
    assert first.returncode == 0, first_output
    found = outcome_of(clone.folder)
    survived = second.returncode != 0 and "lock" in second_output and found == reference_outcome
    tally("two dvc repro at once", survived)
    assert survived, second_output
