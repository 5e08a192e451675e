"""Write tables: CSV files for spreadsheets, and aligned text for terminals and Markdown."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj8.runtime.files import replace_file

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def cell_text(value: bool | int | float) -> str:
    """Return a cell that is not text as text: `true`, `2`, `2.5`.

    A whole number is written without decimals, because a column of integers with a missing cell is
    stored as floats.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or value.is_integer():
        return str(int(value))
    return repr(value)


def write_csv(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    decimals: int | None = None,
) -> None:
    """Write a CSV file atomically. Cells that a spreadsheet would run as a formula are escaped.

    Args:
        path: file to write.
        rows: cells by column. A column that a row lacks is empty.
        columns: written as the header, also if there are no rows: DVC cannot plot a file without
            one. Further columns of the rows follow, in order of first appearance.
        decimals: number of decimals of floats; None writes them exactly.
    """
    rows = list(rows)
    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    with (
        replace_file(path) as staging,
        open(staging, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v, decimals) for k, v in row.items()} for row in rows)


def _cell(cell: Any, decimals: int | None) -> Any:
    if isinstance(cell, float):
        return cell if decimals is None else f"{cell:.{decimals}f}"
    if not isinstance(cell, str):
        return cell
    # The csv module does not quote a single carriage return, which readers treat as end of row.
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    is_formula = cell[:1] in tuple("=+-@\t\n") and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def format_table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] = (),
    align: str = "lr",
    style: str = "plain",
) -> list[str]:
    """Return the lines of a table with aligned columns, which `tabulate` lays out.

    Args:
        rows: cells as they are to be shown.
        header: a title per column; empty for none.
        align: "l" (left) or "r" (right) per column; the last one is repeated.
        style: "plain", or "pipe" for Markdown.
    """
    from tabulate import tabulate

    width = len(header) or max((len(row) for row in rows), default=0)
    sides = align.ljust(width, align[-1])[:width]
    table = tabulate(
        rows,
        headers=list(header),
        tablefmt=style,
        colalign=[{"l": "left", "r": "right"}[side] for side in sides] if rows else None,
        disable_numparse=True,
        preserve_whitespace=True,
    )
    return [line.rstrip() for line in table.splitlines()]
