"""From a file to batches of rows: CSV, TSV, JSON Lines, JSON, Parquet, plain text; compressed too.

Every format ends in the same frames: a column for each field asked for, a `<field>_kind` beside it
that says what the cell was in the file, and `file` and `row`, by which a person finds it again.
`row` counts from 1: lines of JSON Lines and plain text, elements of a JSON array, rows of Parquet,
and records of CSV and TSV, whose header is not counted and whose quoted cells may span lines. A row
that cannot be taken apart (a line that is no JSON, a record with a cell too many) has no cells and
says why in `problem`: the rows around it are as good as ever. What leaves no rows to go on with,
such as a quote that is never closed, is an error.

Files are streamed; only a JSON array is read whole. `datasets` has CSV and JSON readers of its own,
tried and rejected: a CSV line with one cell too many shifts every column without a word, a blank
line in JSON Lines ends in `Expected object or value`, mixed types are cast, and no error names its
line.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd

from gptj8.dataset.readers.parsers import (
    BATCH_ROWS,
    COMPRESSIONS,
    DELIMITERS,
    SUFFIXES,
    Row,
    open_parquet,
    parse_file,
    suffix_of,
)
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import quote, suggest


def read_rows(path: str | Path, columns: Mapping[str, str], text_row: str = "line") -> pd.DataFrame:
    """Read one file whole; see `read_batches`."""
    return pd.concat(read_batches(path, columns, text_row=text_row), ignore_index=True)


def read_batches(
    path: str | Path,
    columns: Mapping[str, str],
    optional: Iterable[str] = (),
    text_row: str = "line",
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[pd.DataFrame]:
    """Read one file in frames of up to `BATCH_ROWS` rows.

    Args:
        path: a file in one of the formats.
        columns: the fields wanted, each with the name of its column; a plain text file has no
            columns and gives its text for the single field `text`.
        optional: fields whose column may be absent.
        text_row: `line` or `file`: what a row of plain text is.
        advance: called with the bytes of the file that were read since the last call.

    Yields:
        For each field its text (null where the file has none) and `<field>_kind`: `text`,
        `integer`, `number`, `boolean`, `list`, `object`, `missing`, `undecodable` (bytes that are
        not UTF-8, which the text shows as U+FFFD) or another type's name; `problem`, null but in a
        row without cells; `warning`, null but in a row that may not be one; and `file` and `row`.

    Raises:
        UserError: naming the file, and line and column where they are known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(explain_missing_file(path))
    if suffix_of(path) not in SUFFIXES:
        shown = path.suffix or "no suffix"
        known = f"{', '.join(SUFFIXES)}, each also with {', '.join(COMPRESSIONS)}"
        raise UserError(f"{path}: {shown} is not one of {known}")
    _require_columns(path, columns, frozenset(optional))
    if suffix_of(path) == ".txt":
        columns = dict.fromkeys(columns, "text")
    rows = parse_file(path, columns, text_row, advance)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield _frame(batch, columns, path)


def _frame(batch: list[Row], columns: Mapping[str, str], path: Path) -> pd.DataFrame:
    frame: dict[str, Any] = {}
    for field, column in columns.items():
        cells = [_normalize(row.cells.get(column)) for row in batch]
        values, kinds = zip(*cells, strict=True)
        frame[field] = pd.array(values, dtype="str")
        frame[f"{field}_kind"] = pd.array(kinds, dtype="str")
    frame["problem"] = pd.array([row.problem for row in batch], dtype="str")
    frame["warning"] = pd.array([row.warning for row in batch], dtype="str")
    frame["row"] = [row.number for row in batch]
    return pd.DataFrame(frame).assign(file=pd.array([path.as_posix()] * len(batch), dtype="str"))


def _normalize(cell: Any) -> tuple[str | None, str]:
    """Return a cell as text, and what it was."""
    if isinstance(cell, str):
        return (cell, "text") if cell.isascii() else _normalize_unicode(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None, "missing"
    if isinstance(cell, bool):
        return json.dumps(cell), "boolean"
    if isinstance(cell, int):
        return str(cell), "integer"
    if isinstance(cell, Decimal):  # a database's number
        cell = float(cell)
    if isinstance(cell, float):  # a column of integers with a gap is stored as floats
        return (str(int(cell)), "integer") if cell.is_integer() else (repr(cell), "number")
    if isinstance(cell, list | dict):
        kind = "list" if isinstance(cell, list) else "object"
        text, found = _normalize_unicode(json.dumps(cell, ensure_ascii=False, default=str))
        return text, kind if found == "text" else found
    return str(cell), type(cell).__name__


def _normalize_unicode(cell: str) -> tuple[str, str]:
    try:
        cell.encode()
    except UnicodeEncodeError:
        pass
    else:
        return cell, "text"
    try:
        return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), "undecodable"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell: to U+FFFD
        return cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "text"


def _require_columns(path: Path, columns: Mapping[str, str], optional: frozenset[str]) -> None:
    required = {field: column for field, column in columns.items() if field not in optional}
    if suffix_of(path) == ".txt":
        if list(columns) != ["text"]:
            needed = " and ".join(columns)
            raise UserError(f"{path} is plain text and has no columns, but {needed} are needed")
        return
    names = _column_names(path, required.values())
    missing = [(field, column) for field, column in required.items() if column not in names]
    if missing:
        listed = " and ".join(
            f"{quote(column)} ({_param(field)}){suggest(column, names)}"
            for field, column in missing
        )
        shown = ", ".join(map(quote, names[:30])) or "none"
        alone = len(names) == 1 and suffix_of(path) == ".csv"
        hint = "; are its cells separated by commas?" if alone else ""
        raise UserError(f"{path} has no column {listed}; its columns: {shown}{hint}")


def _param(field: str) -> str:
    known = ("text", "label", "prompt", "completion", "messages")
    return f"data.{field}_column" if field in known else "in data.prompt_template"


def _column_names(path: Path, wanted: Iterable[str]) -> list[str]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        with open_parquet(path) as file:
            return file.schema_arrow.names
    names: dict[str, None] = {}
    empty = True
    for row in parse_file(path, {}, "line", lambda size: None):
        empty = False
        names.update(dict.fromkeys(row.cells))
        if names.keys() >= set(wanted) or (suffix in DELIMITERS and row.cells):
            break  # a JSON object may lack a key that a later one has
    # Not one row is JSON: that is what is to be told, and not that a column is missing.
    return list(names) if names or empty else list(wanted)


def explain_missing_file(path: Path) -> str:
    """Return that `path` does not exist, and which file near it may have been meant."""
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return f"{path} does not exist{suggest(path.name, names)}"
