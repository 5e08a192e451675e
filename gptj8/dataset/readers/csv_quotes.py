"""Locate quoting errors in a CSV record; Python's reader does not report positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class QuoteProblem(NamedTuple):
    """A quoting error: its line and column in the record, counted from 1, and the reason."""

    line: int
    column: int
    reason: str


def find_quote_problem(lines: Iterable[str], delimiter: str, max_cell: int) -> QuoteProblem | None:
    """Read one record as `csv.reader(strict=True)` does and return the first quoting error.

    Args:
        lines: the physical lines, with line ends, from the first line of the record.
        delimiter: the separator between cells.
        max_cell: characters after which a quoted cell counts as unclosed.
    """
    state = "start"
    opened = (0, 0)
    length = 0
    for number, line in enumerate(lines, 1):
        for column, character in enumerate(line, 1):
            if state == "quoted":
                length += 1
                if character == '"':
                    state = "closing"
                elif length > max_cell:
                    reason = f"a quoted cell has more than {max_cell:,} characters"
                    advice = "the closing quote is probably missing"
                    return QuoteProblem(*opened, f"{reason}; {advice}")
            elif state == "closing" and character == '"':
                state = "quoted"
            elif character == delimiter:
                state = "start"
            elif character in "\r\n":
                return None
            elif state == "closing":
                reason = "text follows a closing quote; double any quote inside a cell"
                return QuoteProblem(number, column, reason)
            elif state == "start" and character == '"':
                state, opened, length = "quoted", (number, column), 0
            else:
                state = "plain"
    return (
        QuoteProblem(*opened, "a quote is opened and never closed") if state == "quoted" else None
    )
