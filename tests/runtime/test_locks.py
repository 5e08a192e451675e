"""Tests of locks between processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptj8.runtime.locks import locked

COUNT = """
import sys
from pathlib import Path
from gptj8.runtime.locks import locked
counter = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locked(counter.parent / "locks" / "turn.lock"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_a_lock_leaves_no_file(tmp_path):
    with locked(tmp_path / "folder" / "a.lock") as held:
        assert held
        assert (tmp_path / "folder" / "a.lock").exists()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_second_process_is_told_that_the_lock_is_taken(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gptj8.runtime.locks import locked\n"
        "with locked(Path(sys.argv[1]), wait=False) as held: print(held)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.lock")]
    with locked(tmp_path / "a.lock"):
        assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "folder").symlink_to("nowhere")
    with pytest.raises(FileExistsError), locked(tmp_path / "folder" / "a.lock", wait=False):
        pass


def test_no_update_is_lost_although_every_holder_deletes_the_file(tmp_path):
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "counter"), "300"]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "1200"
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from gptj8.runtime.locks import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.lock")])
    assert (tmp_path / "a.lock").exists()
    with locked(tmp_path / "a.lock", wait=False) as held:
        assert held
    assert not (tmp_path / "a.lock").exists()
