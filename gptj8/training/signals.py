"""Signals that end a process, at a moment when nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Keeps SIGINT and SIGTERM waiting between `hold` and `release`; also a context manager.

    What came in between is delivered by `release`, to the handlers that were there before. Outside
    the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    def hold(self) -> None:
        """Begin; once begun it does nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING:
            handler = signal.signal(number, self._note)
            # None: installed by C code, which Python cannot put back.
            self._before[number] = signal.SIG_DFL if handler is None else handler

    def release(self) -> None:
        """End, and deliver what came; where nothing is held it does nothing."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        came, self._came = self._came, None
        if came is not None:
            signal.raise_signal(came)

    def __enter__(self) -> HeldSignals:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
