"""Two processes give the same adapter and scores as one process, and one MLflow run."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptj8.params.sections import parse_params
from gptj8.runtime import distributed
from gptj8.runtime.errors import UserError
from tests.helpers.project_clone import STAGES, Clone, assert_complete

LAUNCHER = "torchrun --nproc-per-node 2"
MINIMAL = {"data": {"train": "x"}, "model": {"path": "y"}}
# Run in each of two processes: distribute 5 items and 1 item, make a decision, compute a sum.
SHARES = """
import json, os
from gptj8.runtime import distributed
distributed.join()
n = distributed.process_number()
found = [
    distributed.each_a_share(lambda numbers: [10 * i for i in numbers], 5),
    distributed.each_a_share(lambda numbers: [f"{i}" for i in numbers], 1),
    distributed.from_main(lambda: os.getpid()) == os.getpid(),
    distributed.summed((n, 1.5)),
    distributed.is_main_process(),
]
with open(f"{n}.json", "w") as stream:
    json.dump(found, stream)
distributed.leave()
"""
FAILS = """
import sys, time
from gptj8.runtime import distributed
from gptj8.runtime.errors import UserError
from gptj8.runtime.process import run
main = distributed.is_main_process()
def fail():
    raise UserError(f"raised by {distributed.process_number()}")
def all_late():
    time.sleep(2 * main)
    fail()
def only_one():
    if not main:
        fail()
    time.sleep(60)
def decision():
    distributed.from_main(fail)
def share():
    distributed.each_a_share(lambda numbers: [] if main else fail(), 4)
def exit_code():
    if not main:
        sys.exit(7)
    time.sleep(60)
def work():
    distributed.join()
    HOW()
run(work)
"""


def launched(folder, source, launcher=LAUNCHER, **kwargs):
    """Start a module with the given source through a launcher, in a new process."""
    (folder / "work.py").write_text(source)
    command = f"from gptj8.runtime.distributed import launch; launch({launcher!r}, 'work')"
    return subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        text=True,
        stderr=subprocess.PIPE,
        **kwargs,
    )


@pytest.mark.slow
def test_shares_decisions_and_sums(tmp_path):
    with launched(tmp_path, SHARES) as process:
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    for number in (0, 1):
        is_main = number == 0
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found == [[0, 10, 20, 30, 40], ["0"], is_main, [1, 3.0], is_main]


def test_a_single_process_needs_no_process_group():
    assert distributed.launch(None, "work") is False
    assert distributed.each_a_share(lambda numbers: [2 * i for i in numbers], 3) == [0, 2, 4]
    assert distributed.from_main(lambda: 5) == 5
    assert distributed.summed((1, 2.5)) == [1, 2.5]
    distributed.join()
    distributed.leave()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "stderr"),
    [
        ("all_late", 2, "error: raised by 0\n"),
        ("only_one", 2, "error: raised by 1\n"),
        ("decision", 2, "error: raised by 0\n"),
        ("share", 2, "error: raised by 1\n"),
        ("exit_code", 7, ""),
    ],
)
def test_an_error_is_printed_once_and_sets_the_exit_code(tmp_path, how, code, stderr):
    with launched(tmp_path, FAILS.replace("HOW", how)) as process:
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (code, stderr)


@pytest.mark.slow
def test_a_killed_process_is_reported_with_its_signal(tmp_path):
    kills = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "work.py").write_text(f"{kills} if int(os.environ['RANK']) else None")
    source = (
        "from gptj8.runtime.process import run\n"
        "from gptj8.runtime.distributed import launch\n"
        f"run(lambda: launch({LAUNCHER!r}, 'work'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    expected = "error: process 1 of 2: it was killed by SIGKILL, usually because memory ran out\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.slow
def test_terminating_the_launcher_terminates_all_processes(tmp_path):
    waits = "import time, os; open(f'{os.getpid()}.pid', 'w'); time.sleep(100)"
    with launched(tmp_path, waits) as process:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    pids = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("torchrun --nproc-per-node 2 --nope", "--nope"),
        ("torchrun --nproc-per-node two", "two"),
        ("torchrun --nproc-per-node 0", "at least 1 process"),
        ("torchrun other.py", "give only torchrun options"),
        ("torchrun --help", "finetune.launcher"),
    ],
)
def test_invalid_torchrun_arguments_raise_a_one_line_error(launcher, reason):
    with pytest.raises(UserError) as raised:
        distributed.launch(launcher, "work")
    assert len(str(raised.value).splitlines()) == 1
    assert f"finetune.launcher = {launcher}: " in str(raised.value)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("rm -rf x", "'rm -rf x' is not a torchrun command line"),
        ("torchrun 'x", "quotation"),
    ],
)
def test_launchers_other_than_torchrun_raise(launcher, reason):
    with pytest.raises(UserError, match=f"finetune.launcher.*{reason}"):
        parse_params({**MINIMAL, "finetune": {"launcher": launcher}})


def test_an_optimizer_step_is_divided_among_processes():
    def for_one_of(processes, **finetune):
        params = parse_params({**MINIMAL, "finetune": {"launcher": LAUNCHER, **finetune}})
        return params.for_one_of(processes).finetune

    auto = {"per_device_train_batch_size": "auto", "train_batch_size": 12}
    assert for_one_of(3, **auto).sequences_per_step == 4
    with pytest.raises(UserError, match="12 cannot be divided by 5 processes"):
        for_one_of(5, **auto)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert for_one_of(2, **sizes).sequences_per_step == 8
    assert for_one_of(2, **sizes, train_batch_size=16).sequences_per_step == 8
    with pytest.raises(UserError, match=r"train_batch_size = 8 is not .* = 16; set"):
        for_one_of(2, **sizes, train_batch_size=8)


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path, tiny_model_dir):
    clone = Clone(tmp_path / "project", tiny_model_dir)

    def outcome(**finetune):
        clone.edit_params(finetune={"learning_rate": 0.01, **finetune})
        process = clone.dvc("repro")
        assert process.returncode == 0, process.stdout + process.stderr
        adapter = load_file(clone.folder / "artifacts" / "adapter" / "adapter_model.safetensors")
        metrics = {stage: clone.metrics(stage) for stage in STAGES}
        return process, adapter, metrics

    _, adapter, metrics = outcome(per_device_train_batch_size=8)
    again, shared_adapter, shared_metrics = outcome(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, launcher=LAUNCHER
    )
    start = "finetune: runs because"
    assert sum(line.startswith(start) for line in again.stdout.splitlines()) == 1
    for name, expected in adapter.items():
        np.testing.assert_allclose(shared_adapter[name], expected, atol=2e-4, err_msg=name)
    compared = ("train_loss", "eval_loss", "steps", "padding_fraction")
    for key in compared[:3]:
        assert shared_metrics["finetune"][key] == pytest.approx(metrics["finetune"][key], rel=1e-3)
    for key, expected in metrics["evaluate"].items():
        if not key.endswith(("seconds", "tokens_per_second", "memory_gib")):
            found = shared_metrics["evaluate"][key]
            assert found == pytest.approx(expected, rel=2e-3, abs=2e-3), key
    rows = clone.runs()
    assert len(rows) == 2
    (row,) = (r for r in rows.values() if r.data.params["finetune.launcher"] == LAUNCHER)
    assert_complete(row, clone)
