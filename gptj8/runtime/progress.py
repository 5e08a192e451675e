"""Show progress: a bar on a terminal, lines in a log.

Every line begins with the name of the stage, including lines printed by package code that does not
know the stage. `Story` sets the name once per process.

On a terminal progress is a bar, which is removed when the work is done because the stage then
prints its result. In a log a bar would be one endless line, so a complete line is printed every
half minute, and none for work that takes less. Both show the time left at the mean speed so far.
Alternative considered: the speed of the last seconds; it was rejected because it is far too low
during a validation and far too high after it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gptj8.runtime.distributed import is_main_process
from gptj8.runtime.files import format_bytes

LOG_SECONDS = 30.0
"""Seconds between two progress lines in a log."""

_REFRESH_SECONDS = 0.5
# The time left comes before the postfix, which may not fit on a terminal of 80 columns.
_BAR = (
    "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt} of {total_fmt} {unit}, {remaining} left{postfix}"
)

_speaker = ""

_Item = TypeVar("_Item")


def set_speaker(name: str) -> None:
    """Set the stage name that progress lines begin with; an empty string removes it."""
    global _speaker
    _speaker = name


class Progress:
    """A progress display, created by `progress`. Calling it with a number advances it."""

    def __init__(
        self, total: int, description: str, unit: str, log_seconds: float | None = None
    ) -> None:
        if _speaker and description != _speaker:
            description = f"{_speaker}: {description}"
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._log_seconds = LOG_SECONDS if log_seconds is None else log_seconds
        self._facts = ""
        self._started = self._printed_at = time.monotonic()
        self._printed_done: int | None = None
        self._bar: Any = None
        self._is_shown = is_main_process()
        if self._is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=description,
                unit=unit,
                unit_scale=unit == "bytes",
                bar_format=_BAR,
                mininterval=_REFRESH_SECONDS,
                miniters=1,  # otherwise the bar stalls when the work slows down
                smoothing=0,
                leave=False,
                # tqdm shows nothing on a terminal that does not report its size.
                ncols=shutil.get_terminal_size().columns,
            )

    def __call__(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed_at >= self._log_seconds and self.done < self.total:
            self.tell()

    def show(self, facts: str) -> None:
        """Set the text shown after the count from now on, such as a loss."""
        self._facts = facts
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)

    def tell(self) -> None:
        """Print a progress line in a log. On a terminal the bar already shows it."""
        if self._bar is not None or not self._is_shown:
            return
        self._printed_at, self._printed_done = time.monotonic(), self.done
        seconds = self._printed_at - self._started
        if self.done >= self.total:
            time_left = f"took {format_seconds(seconds)}"
        elif self.done:
            left = seconds / self.done * (self.total - self.done)
            time_left = f"{format_seconds(left)} left"
        else:
            time_left = ""
        parts = (self._amount(), self._facts, time_left)
        print(f"{self.description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def close(self, is_complete: bool = True) -> None:
        """Remove the bar. In a log, print the last line if earlier lines were printed."""
        if self._bar is not None:
            self._bar.close()
        elif is_complete and self._printed_done is not None and self._printed_done < self.done:
            self.tell()

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"


@contextmanager
def progress(
    total: int, description: str, unit: str, log_seconds: float | None = None
) -> Iterator[Progress]:
    """Show progress towards `total`.

    Args:
        total: the amount of work.
        description: the name of the work.
        unit: the unit of `total`, in the plural; `bytes` are shown as MB and GB.
        log_seconds: seconds between two lines in a log; None: `LOG_SECONDS`.

    Yields:
        A callable that takes the number of units just completed.
    """
    shown = Progress(total, description, unit, log_seconds)
    try:
        yield shown
    except BaseException:
        shown.close(is_complete=False)
        raise
    shown.close()


def each(items: Iterable[_Item], total: int, description: str, unit: str) -> Iterator[_Item]:
    """Yield the items and show the number that is done. See `progress` for the arguments."""
    with progress(total, description, unit) as advance:
        for item in items:
            yield item
            advance()


def format_seconds(seconds: float) -> str:
    """Return a readable duration: `0.4 s`, `45 s`, `12 min` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
