"""Limit the run time of a block of code."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class LateError(BaseException):
    """The time limit has passed. Not an `Exception`, which the code under test might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer. Python code is also interrupted."""

    def stop(number: int, frame: object) -> None:
        raise LateError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - started < seconds, "took too long"
