"""How a process begins: the settings of its heap."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from gptj8.runtime import tame_the_heap
print("begun", os.getpid(), sys.flags.optimize, sys.argv[1:])
tame_the_heap()
print("goes on", os.getpid(), os.environ.get("GLIBC_TUNABLES", ""))
"""


def lines_of(tmp_path, tunables=None):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-O", str(script), "an argument", "--flag"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert not process.stderr
    return process.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("own", [None, "glibc.cpu.x86_ibt=off"])
def test_a_process_begins_anew_once_with_its_arguments(tmp_path, own):
    first, second, last = lines_of(tmp_path, own)
    assert first == second and first.endswith("1 ['an argument', '--flag']")
    assert last.split()[2] == first.split()[1]  # the same process
    tunables = last.split()[3].split(":")
    assert "glibc.malloc.tcache_count=0" in tunables
    assert own is None or own in tunables


def test_settings_of_the_users_own_stay(tmp_path):
    first, last = lines_of(tmp_path, "glibc.malloc.tcache_count=3")
    assert first.startswith("begun") and last.endswith(" glibc.malloc.tcache_count=3")
