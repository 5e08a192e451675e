"""A parsed row, and what can be wrong with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import quote
from gptj8.runtime.tables import cell_text


@dataclass(frozen=True)
class Row:
    """A parsed row: its cells by column, or a `problem`; a `warning` marks a doubtful row.

    Attributes:
        number: its place in the file, counted from 1.
        continues: whether its text continues that of the row before.
        next_row: the number of the row that continues its text; 0 if none does.
    """

    number: int
    cells: Mapping[str, Any]
    problem: str | None = None
    warning: str | None = None
    continues: bool = False
    next_row: int = 0


class EmptyFileError(UserError):
    """A file has no rows, which is harmless if other files have some."""


def check_names(names: Sequence[str], path: Path, read: Iterable[str]) -> None:
    """Raise UserError if the name of a column that is read is repeated, which is ambiguous."""
    wanted = set(read)
    counts = Counter(names)
    repeated = sorted(name for name, count in counts.items() if count > 1 and name in wanted)
    if repeated:
        listed = ", ".join(map(quote, repeated[:10]))
        raise UserError(f"{path} has repeated column names: {listed}")


def cell_of(cells: Mapping[str, Any], column: str) -> Any:
    """Return the cell of a column; None if there is none.

    A name with dots that is not a column's name is a path into objects and lists, such as
    `translation.en`, `answers.text` or `choices.0`.
    """
    if column in cells or "." not in column:
        return cells.get(column)
    found: Any = cells
    for key in column.split("."):
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def on_lines(cell: list[Any]) -> str | None:
    """Return the items of a list, one per line; None if they are not texts or numbers."""
    if not all(isinstance(item, str | int | float) for item in cell):
        return None
    return "\n".join(item if isinstance(item, str) else cell_text(item) for item in cell)


def outermost(column: str, names: Iterable[str]) -> str:
    """Return the column that holds a nested one: `translation` for `translation.en`."""
    return column if column in names else column.partition(".")[0]


def text_and_kind(cell: Any) -> tuple[str | None, str]:
    """Return a cell as text, and its kind; see `gptj8.dataset.readers.formats.read_batches`."""
    if isinstance(cell, str):
        return (cell, "text") if cell.isascii() else _valid_unicode(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None, "missing"
    if isinstance(cell, Decimal):  # from a database
        cell = float(cell)
    if isinstance(cell, bool):
        return cell_text(cell), "boolean"
    if isinstance(cell, int | float):
        is_whole = isinstance(cell, int) or cell.is_integer()
        return cell_text(cell), "integer" if is_whole else "number"
    if isinstance(cell, list | dict):
        kind = "list" if isinstance(cell, list) else "object"
        text, found = _valid_unicode(json.dumps(cell, ensure_ascii=False, default=str))
        return text, kind if found == "text" else found
    return str(cell), type(cell).__name__


def _valid_unicode(cell: str) -> tuple[str, str]:
    try:
        cell.encode()
    except UnicodeEncodeError:
        pass
    else:
        return cell, "text"
    try:
        return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), "undecodable"
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can contain, becomes U+FFFD
        return cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "text"
