"""The start-up of a process: malloc settings, cached matrix products, imports and signals."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.project_clone import hear_interrupts

SCRIPT = """
import os, sys
from gptj8.runtime.process import run
print("started", os.getpid(), sys.flags.optimize, sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
def main():
    print("running", os.getpid(), os.environ.get("GLIBC_TUNABLES"))
    print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
run(main, computes=True)
"""
SETTING = "glibc.malloc.tcache_count=0"


def lines_of(tmp_path, how, **own):
    (tmp_path / "script.py").write_text(SCRIPT)
    unset = ("GLIBC_TUNABLES", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {
        # Dask sets MALLOC_TRIM_THRESHOLD_ for its workers in another test.
        name: value
        for name, value in os.environ.items()
        if name not in unset and not name.startswith("MALLOC_")
    }
    environment = {**environment, "PYTHONPATH": str(ROOT), **own}
    command = [sys.executable, "-O", *how, "an argument", "--flag"]
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path
    )
    assert not process.stderr
    return process.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("how", [["script.py"], ["-m", "script"]], ids=["file", "module"])
@pytest.mark.parametrize("own", [None, "glibc.cpu.x86_ibt=off"])
def test_a_process_restarts_once_with_its_arguments(tmp_path, how, own):
    first, second, last, kept = lines_of(tmp_path, how, **({"GLIBC_TUNABLES": own} if own else {}))
    _, process, *rest = first.split()
    assert " ".join(rest) == f"1 ['an argument', '--flag'] {own}"
    assert second.startswith(f"started {process} 1 ['an argument', '--flag'] ")  # the same process
    tunables = second.split()[-1].split(":")
    assert SETTING in tunables and (own is None or own in tunables)
    assert last == f"running {process} {own}"  # children get the user's settings
    assert kept == "32 32"


@pytest.mark.parametrize(
    "own", [{"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, {"MALLOC_ARENA_MAX": "1"}], ids=str
)
def test_the_users_own_settings_are_kept(tmp_path, own):
    first, last, kept = lines_of(tmp_path, ["script.py"], **own, LRU_CACHE_CAPACITY="7")
    value = own.get("GLIBC_TUNABLES")
    assert first.startswith("started") and last.startswith("running")
    assert last.endswith(f" {value}")
    assert kept == "7 32"


def test_stages_that_compute_with_a_model_request_the_settings():
    computing = {
        path.stem
        for path in (ROOT / "stages").glob("*.py")
        if re.search(r"run\(main, computes=True\b", path.read_text())
    }
    assert computing == {"finetune", "evaluate", "export"}


IMPORTS_OF_TRAINING = """
import sys
from gptj8.runtime.process import UNUSED_IN_TRAINING, run
def main():
    import torch
    import gptj8.model.adapters, gptj8.dataset.prepared.dataset, gptj8.dataset.prepared.examples
    import gptj8.memory.training_memory, gptj8.model.loading, gptj8.model.scoring.likelihood
    import gptj8.dataset.prepared.prompts, gptj8.export.reference_answers, gptj8.tracking.stage
    from gptj8.training.loop import train
    no_gpu = torch.__version__.endswith("+cpu")
    for name in (*UNUSED_IN_TRAINING, *(["triton"] if no_gpu else [])):
        assert not [module for module in sys.modules if module.startswith(name + ".")], name
    if no_gpu:
        assert not torch.utils._triton.has_triton_package()
run(main, computes=True, unused=UNUSED_IN_TRAINING)
"""


def test_training_does_not_import_unused_packages(tmp_path):
    (tmp_path / "script.py").write_text(IMPORTS_OF_TRAINING)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)


SLOW_RESTART = """
import sys, time
from gptj8.runtime.process import run
if "gptj8_heap" in sys._xoptions:
    print("started", flush=True)
    time.sleep(1)
run(lambda: time.sleep(30), computes=True)
"""


def interrupted(command, folder):
    """Send SIGINT after a process has printed a line; return its exit code and stderr."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_an_interrupt_is_deferred_until_the_restart_is_complete(tmp_path):
    (tmp_path / "script.py").write_text(SLOW_RESTART)
    assert interrupted(["script.py"], tmp_path) == (130, "interrupted\n")


def test_an_interrupt_during_a_stages_imports_prints_nothing(tmp_path):
    stages = tmp_path / "stages"
    stages.mkdir()
    shutil.copy(ROOT / "stages" / "__init__.py", stages)
    (stages / "slow.py").write_text("import time\nprint('started', flush=True)\ntime.sleep(30)\n")
    assert interrupted(["-m", "stages.slow"], tmp_path) == (-signal.SIGINT, "")


PRINTS = """
import sys
from gptj8.runtime.process import run
run(lambda: [print(number) for number in range(int(sys.argv[1]))])
"""


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_leaves_causes_no_traceback(lines):
    """As in `gptj8 X | head`; few lines are written only when the process exits."""
    command = [sys.executable, "-c", PRINTS, str(lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, b"")


def test_another_broken_pipe_is_still_an_error():
    code = "from gptj8.runtime.process import run\ndef main(): raise BrokenPipeError(32, 'lost')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}run(main)"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "BrokenPipeError: [Errno 32] lost" in done.stderr
