"""Hours of work: memory and open files stay as they are after the first minutes.

GPTJ8_ENDURANCE_SECONDS, an hour by default, is divided among training, evaluation and serving.
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
"""What the medians of two parts of one process may differ by: pools that fill up."""

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
    """Return the resident memory of a process in MB, and how many files it has open."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1000
    return resident, len(os.listdir(f"/proc/{process}/fd"))


def watched(process: subprocess.Popen, work: Callable[[], object]) -> list[tuple[float, int]]:
    """Return what a process used each second, from a tenth of the time on, while work is done."""
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
    held = memory[1] - memory[0] < _GROWTH_MB and files[1] <= files[0]
    hours = SECONDS / 3600
    tally(
        f"{what} for {hours:.2f} h: {memory[0]:.0f} to {memory[1]:.0f} MB, {files[1]} files", held
    )
    assert held, (memory, files)


def pause() -> None:
    time.sleep(1)


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.faults
def test_training(undisturbed, tmp_path, tally):
    project = undisturbed.copy(tmp_path / "project")
    file = project.folder / "params.yaml"
    text = file.read_text().replace("num_train_epochs: 1\n", "num_train_epochs: 100000\n")
    file.write_text(text.replace("save_minutes: 0\n", "save_minutes: 0.2\n"))
    # To files: a pipe that nobody reads would stop it.
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.finetune"],
            cwd=project.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=said,
        )
        try:
            assert_flat(watched(process, pause), tally, "training")
        finally:
            end(process)
    assert process.returncode == 143
    assert any((project.folder / ".gptj8" / "checkpoints").glob("*/step-*"))


@pytest.mark.faults
def test_evaluation(undisturbed: StageProject, tally):
    artifacts = undisturbed.folder / "artifacts"
    process = subprocess.Popen(
        [sys.executable, "-c", _EVALUATE, artifacts / "base-8bit", artifacts / "adapter"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert_flat(watched(process, pause), tally, "evaluation")
    finally:
        end(process)


@pytest.mark.faults
def test_serving(undisturbed: StageProject, tally):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    artifacts = undisturbed.folder / "artifacts"
    command = [sys.executable, "-m", "gptj8.commands.main", "serve", "--port", str(port)]
    command += ["--model", str(artifacts / "base-8bit"), "--adapter", str(artifacts / "export")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    asked = 0

    def answers() -> bool:
        try:
            return requests.get(url + "/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    def ask() -> None:
        nonlocal asked
        until_next = time.monotonic() + 1
        while time.monotonic() < until_next:
            asked += 1
            body = {"prompt": "fox " * (asked % 20 + 1), "max_new_tokens": 8, "stream": True}
            with requests.post(url + "/generate", json=body, stream=True, timeout=30) as answer:
                if asked % 5:  # each fifth client is gone before the end
                    assert answer.content
            row = {"row": {"text": "wizard " * (asked % 20 + 1)}}
            assert requests.post(url + "/classify", json=row, timeout=30).ok
            requests.post(url + "/classify", json={"row": {"wrong": 1}}, timeout=30)

    try:
        until(answers, 60)
        assert_flat(watched(process, ask), tally, "serving")
    finally:
        end(process)
