"""What a process tells whoever is at the terminal, or reads its log: lines and progress.

Every line begins with the stage that speaks, also where the work is done deep in the package, which
knows of no stage: `Story` names the speaker once a process.

Progress is a bar on a terminal, gone when its work is done, since the stage then says what came of
it. A log has no use for a bar, every refresh of which is more of a line without an end: it gets a
whole line every half minute, and none for what is done sooner. Both tell the time left, which is
what is left at the mean pace so far: validation in between is then counted as it comes, while a
pace of the last seconds would promise much after it and little during it.
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
"""Between two lines of progress in a log."""

_REFRESH_SECONDS = 0.5
# The time left before the facts: a terminal of 80 columns has no room for all of them.
_BAR = (
    "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt} of {total_fmt} {unit}, {remaining} left{postfix}"
)

_speaker = ""

_Item = TypeVar("_Item")


def set_speaker(name: str) -> None:
    """Put a stage's name before the lines of progress that follow; "": none."""
    global _speaker
    _speaker = name


class Progress:
    """How much of something is done; made by `progress`. Calling it with a number adds to that."""

    def __init__(self, total: int, description: str, unit: str) -> None:
        if _speaker and description != _speaker:
            description = f"{_speaker}: {description}"
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._facts = ""
        self._started = self._told = time.monotonic()
        self._told_done: int | None = None
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
                miniters=1,  # else a slower pace is not shown
                smoothing=0,
                leave=False,
                # Not tqdm's own idea: a terminal that does not know its size would get nothing.
                ncols=shutil.get_terminal_size().columns,
            )

    def __call__(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told >= LOG_SECONDS and self.done < self.total:
            self.tell()

    def show(self, facts: str) -> None:
        """Set what stands beside the number from now on, such as a loss."""
        self._facts = facts
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)

    def tell(self) -> None:
        """Print a line in a log; a bar tells it all the time."""
        if self._bar is not None or not self._is_shown:
            return
        self._told, self._told_done = time.monotonic(), self.done
        seconds = self._told - self._started
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
        """Take the bar away; in a log, end what was begun there."""
        if self._bar is not None:
            self._bar.close()
        elif is_complete and self._told_done is not None and self._told_done < self.done:
            self.tell()

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"


@contextmanager
def progress(total: int, description: str, unit: str) -> Iterator[Progress]:
    """Show how much of `total` is done, and yield what to call with each further number.

    Args:
        total: all there is to do.
        description: what is done.
        unit: of what, in the plural; `bytes` are shown as MB and GB.
    """
    shown = Progress(total, description, unit)
    try:
        yield shown
    except BaseException:
        shown.close(is_complete=False)
        raise
    shown.close()


def each(items: Iterable[_Item], total: int, description: str, unit: str) -> Iterator[_Item]:
    """Yield the items and show how many of them are done; arguments as for `progress`."""
    with progress(total, description, unit) as advance:
        for item in items:
            yield item
            advance()


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: `0.4 s`, `45 s`, `12 min`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
