"""Test that memory and open files stay constant after the first minutes of long runs.

GPTJ8_ENDURANCE_SECONDS, one hour by default, is divided among training, evaluation and serving.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.faults.stage_project import StageProject
from tests.helpers.paths import ROOT
from tests.helpers.served_models import until

SECONDS = float(os.environ.get("GPTJ8_ENDURANCE_SECONDS", "3600")) / 3
_GROWTH_MB = 16
"""Allowed difference between the medians of early and late samples, for pools that fill up."""

_EVALUATE = """
import sys, torch
from gptj8.model.scoring.likelihood import score_labels
from gptj8.model.scoring.perplexity import score_documents
from gptj8.model.loading import load_adapter, load_model
base, adapter = sys.argv[1:]
model = load_adapter(load_model(base, torch.float32, torch.device("cpu")), adapter)
generator = torch.Generator().manual_seed(0)
while True:
    sizes = torch.randint(5, 60, (32,), generator=generator).tolist()
    ids = [torch.randint(1, 300, (n,), generator=generator).tolist() for n in sizes]
    score_labels(model, ids, [[5, 6], [7]], batch_size=8, description=None)
    score_documents(model, ids, [1] * len(ids), batch_size=8, description=None)
    model.generate(torch.tensor([ids[0]]), max_new_tokens=8, pad_token_id=0)
"""


def usage(process: int) -> tuple[float, int]:
    """Return the resident memory of a process in MB and its number of open files."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1000
    return resident, len(os.listdir(f"/proc/{process}/fd"))


def watched(process: subprocess.Popen, work: Callable[[], object]) -> list[tuple[float, int]]:
    """Return the usage of a process after each call of `work`, except in the first tenth."""
    samples, end = [], time.monotonic() + SECONDS
    warm = time.monotonic() + SECONDS / 10
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        work()
        if time.monotonic() > warm:
            samples.append(usage(process.pid))
    return samples


def assert_flat(samples: list[tuple[float, int]], tally, what: str) -> None:
    third = len(samples) // 3
    assert third >= 5
    early, late = samples[:third], samples[-third:]
    memory = [statistics.median(sample[0] for sample in part) for part in (early, late)]
    files = [max(sample[1] for sample in part) for part in (early, late)]
    is_flat = memory[1] - memory[0] < _GROWTH_MB and files[1] <= files[0]
    hours = SECONDS / 3600
    tally(
        f"{what} for {hours:.2f} h: {memory[0]:.0f} to {memory[1]:.0f} MB, {files[1]} files",
        is_flat,
    )
    assert is_flat, (memory, files)


def pause() -> None:
    time.sleep(1)


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.faults
def test_training(reference, tmp_path, tally):
    project = reference.copy(tmp_path / "project")
    file = project.folder / "params.yaml"
    text = file.read_text().replace("num_train_epochs: 1\n", "num_train_epochs: 100000\n")
    file.write_text(text.replace("save_minutes: 0\n", "save_minutes: 0.2\n"))
    # Output goes to a file, because a full pipe would block the process.
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.finetune"],
            cwd=project.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
        try:
            assert_flat(watched(process, pause), tally, "training")
        finally:
            end(process)
    assert process.returncode == 143
    assert any((project.folder / ".gptj8" / "checkpoints").glob("*/step-*"))


@pytest.mark.faults
def test_evaluation(reference: StageProject, tally):
    artifacts = reference.folder / "artifacts"
    process = subprocess.Popen(
        [sys.executable, "-c", _EVALUATE, artifacts / "base-8bit", artifacts / "adapter"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert_flat(watched(process, pause), tally, "evaluation")
    finally:
        end(process)


@pytest.mark.faults
def test_serving(reference: StageProject, tally):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    artifacts = reference.folder / "artifacts"
    command = [sys.executable, "-m", "gptj8.commands.main", "serve", "--port", str(port)]
    command += ["--model", str(artifacts / "base-8bit"), "--adapter", str(artifacts / "export")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    requested = 0

    def is_ready() -> bool:
        try:
            return requests.get(url + "/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    def send_requests() -> None:
        nonlocal requested
        until_next = time.monotonic() + 1
        while time.monotonic() < until_next:
            requested += 1
            body = {"prompt": "fox " * (requested % 20 + 1), "max_new_tokens": 8, "stream": True}
            with requests.post(url + "/generate", json=body, stream=True, timeout=30) as answer:
                if requested % 5:  # every fifth client disconnects early
                    assert answer.content
            row = {"row": {"text": "wizard " * (requested % 20 + 1)}}
            assert requests.post(url + "/classify", json=row, timeout=30).ok
            requests.post(url + "/classify", json={"row": {"wrong": 1}}, timeout=30)

    try:
        until(is_ready, 60)
        assert_flat(watched(process, send_requests), tally, "serving")
    finally:
        end(process)
