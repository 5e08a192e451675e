"""Messages are one line and name the reason."""

import signal
import subprocess
import sys

import pytest

from gptj8.runtime.messages import describe_p_value, one_line, why_process_failed


def ended(code):
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return why_process_failed(process.returncode, process.stderr)


def test_a_killed_process_is_not_explained_by_its_last_warning():
    reason = ended(
        "import os, signal, sys; print('warning: slow tokenizer', file=sys.stderr, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert reason == "it was killed by SIGKILL, usually because memory ran out"


def test_other_signals_have_their_name():
    assert why_process_failed(-signal.SIGSEGV, "") == "it was killed by SIGSEGV"


def test_a_failed_process_is_explained_by_its_error():
    assert ended("raise ValueError('no such layer')") == "ValueError: no such layer"
    assert ended("raise SystemExit(3)") == "no reason given"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("first\n  second\r\n third", "first second third"),
        ("bell \a and escape \x1b[31m", "bell \ufffd and escape \ufffd[31m"),
        ("x" * 400, "x" * 300),
    ],
)
def test_one_line(message, line):
    assert one_line(ValueError(message)) == line


def test_an_error_without_a_message_is_named():
    assert one_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(1.0, "p = 1"), (0.034, "p = 0.03"), (1e-4, "p = 0.0001"), (9.9e-5, "p < 0.0001"),
     (1e-300, "p < 0.0001"), (0.0, "p < 0.0001")],
)  # fmt: skip
def test_a_p_value_is_never_zero(p_value, text):
    assert describe_p_value(p_value) == text
