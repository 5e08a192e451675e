"""Format text for messages: excerpts, lists and suggestions."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence

_EXCERPT = 60
_LONGEST_NAME = 100
_LEAST_P_VALUE = 1e-4


def excerpt(text: str, length: int = _EXCERPT) -> str:
    """Return the beginning of a text as one line of at most `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def listed(values: Sequence[str], limit: int) -> str:
    """Return the first `limit` values, quoted, and the number of values left out."""
    shown = ", ".join(excerpt(repr(value)) for value in list(values)[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def describe_p_value(p_value: float) -> str:
    """Return a p-value for people to read: `p = 0.03`, or `p < 0.0001`, but never 0."""
    return f"p = {p_value:.1g}" if p_value >= _LEAST_P_VALUE else f"p < {_LEAST_P_VALUE:.4f}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean ...?` if a known name is similar, else an empty string."""
    by_lower_case = {c.lower(): c for c in known if len(c) <= _LONGEST_NAME}
    if len(name) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f", did you mean {quote(by_lower_case[close[0]])}?" if close else ""


def quote(name: str) -> str:
    """Return the name, quoted if it has spaces, punctuation or unprintable characters."""
    plain = name and name.isprintable() and not any(c in name for c in " ,;'\"")
    return excerpt(name if plain else repr(name))


def one_line(error: object) -> str:
    """Return an error's message as one line of at most 300 printable characters."""
    line = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def why_process_failed(code: int, errors: str) -> str:
    """Return why a child process failed, in one line.

    Args:
        code: its exit code; negative if a signal ended it.
        errors: what it wrote to standard error.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", usually because memory ran out" if -code == signal.SIGKILL else ""
        return f"it was killed by {name}{hint}"
    lines = errors.strip().splitlines()
    return one_line(lines[-1]) if lines else "no reason given"
