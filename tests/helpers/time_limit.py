"""A stop for what must not take long."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class LateError(BaseException):
    """No `Exception`, which the code under test might take for one of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail, and where Python still runs stop, what takes longer."""

    def stop(number: int, frame: object) -> None:
        raise LateError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - started < seconds, "takes too long"
