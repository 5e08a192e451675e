"""Delay SIGINT and SIGTERM until no update is in progress."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Delay SIGINT and SIGTERM between `hold` and `release`; also a context manager.

    `release` delivers a signal received in between to the previous handlers. Does nothing outside
    the main thread, because Python runs signal handlers only there.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: int | None = None

    def hold(self) -> None:
        """Start delaying signals; does nothing if already started."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.signal(number, self._note)
            # None: the handler was installed by C code, and Python cannot restore it.
            self._before[number] = signal.SIG_DFL if handler is None else handler

    def release(self) -> None:
        """Restore the handlers and deliver a delayed signal; does nothing if not started."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        received, self._received = self._received, None
        if received is not None:
            signal.raise_signal(received)

    def __enter__(self) -> HeldSignals:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
