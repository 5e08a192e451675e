"""How a process begins: the settings of its heap, and how many compiled products it keeps."""

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
print("begun", os.getpid(), sys.flags.optimize, sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
def main():
    print("goes on", os.getpid(), os.environ.get("GLIBC_TUNABLES"))
    print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
run(main, computes=True)
"""
SETTING = "glibc.malloc.tcache_count=0"


def lines_of(tmp_path, how, **own):
    (tmp_path / "script.py").write_text(SCRIPT)
    unset = ("GLIBC_TUNABLES", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {
        # Dask, in another test, sets MALLOC_TRIM_THRESHOLD_ for its workers.
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
def test_a_process_begins_anew_once_with_its_arguments(tmp_path, how, own):
    first, second, last, kept = lines_of(tmp_path, how, **({"GLIBC_TUNABLES": own} if own else {}))
    _, process, *rest = first.split()
    assert " ".join(rest) == f"1 ['an argument', '--flag'] {own}"
    assert second.startswith(f"begun {process} 1 ['an argument', '--flag'] ")  # the same process
    tunables = second.split()[-1].split(":")
    assert SETTING in tunables and (own is None or own in tunables)
    assert last == f"goes on {process} {own}"  # children have what the user has set
    assert kept == "32 32"


@pytest.mark.parametrize(
    "own", [{"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, {"MALLOC_ARENA_MAX": "1"}], ids=str
)
def test_settings_of_the_users_own_stay(tmp_path, own):
    first, last, kept = lines_of(tmp_path, ["script.py"], **own, LRU_CACHE_CAPACITY="7")
    value = own.get("GLIBC_TUNABLES")
    assert first.startswith("begun") and last.startswith("goes on")
    assert last.endswith(f" {value}")
    assert kept == "7 32"


def test_what_computes_with_a_model_asks_for_it():
    asking = {
        path.stem
        for path in (ROOT / "stages").glob("*.py")
        if re.search(r"run\(main, computes=True\b", path.read_text())
    }
    assert asking == {"finetune", "evaluate", "export"}


LEFT_OUT = """
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


def test_training_imports_nothing_of_what_it_never_uses(tmp_path):
    (tmp_path / "script.py").write_text(LEFT_OUT)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)


BEGINS_ANEW = """
import sys, time
from gptj8.runtime.process import run
if "gptj8_heap" in sys._xoptions:
    print("begun", flush=True)
    time.sleep(1)
run(lambda: time.sleep(30), computes=True)
"""


def interrupted(command, folder):
    """Send SIGINT when a process has printed a line; return how it ended, and what it said."""
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
        _, said = process.communicate(timeout=20)
    return process.returncode, said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_an_interrupt_waits_until_the_process_has_begun_anew(tmp_path):
    (tmp_path / "script.py").write_text(BEGINS_ANEW)
    assert interrupted(["script.py"], tmp_path) == (130, "interrupted\n")


def test_an_interrupt_while_a_stage_is_imported_says_nothing(tmp_path):
    stages = tmp_path / "stages"
    stages.mkdir()
    shutil.copy(ROOT / "stages" / "__init__.py", stages)
    (stages / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(30)\n")
    assert interrupted(["-m", "stages.slow"], tmp_path) == (-signal.SIGINT, "")
