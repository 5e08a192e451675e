"""Read files in batches of rows: CSV, TSV, JSON Lines, JSON, Parquet and plain text.

Compressed files are supported. Every format gives the same frames: one column per requested field,
a column `<field>_kind` with the cell's type in the file, and `file` and `row`, which locate the
row. `row` counts from 1: lines of JSON Lines and plain text, elements of a JSON array, rows of
Parquet, and records of CSV and TSV. The header of a CSV or TSV file is not counted, and its quoted
cells may span lines. A malformed row (a line that is not JSON, a record with too many cells) has no
cells and gives the reason in `problem`; the other rows are still read. Damage that makes the rest
of the file unreadable, such as a quote that is never closed, raises an error.

Files are streamed, except a JSON array, which is read into memory. Alternative considered: the CSV
and JSON readers of `datasets`; they were rejected because a CSV line with one extra cell silently
shifts every column, a blank line in JSON Lines fails with `Expected object or value`, mixed types
are cast, and no error gives a line number.
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
from gptj8.runtime.tables import cell_text


def read_rows(path: str | Path, columns: Mapping[str, str], text_row: str = "line") -> pd.DataFrame:
    """Read a complete file into one frame; see `read_batches`."""
    return pd.concat(read_batches(path, columns, text_row=text_row), ignore_index=True)


def read_batches(
    path: str | Path,
    columns: Mapping[str, str],
    optional: Iterable[str] = (),
    text_row: str = "line",
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[pd.DataFrame]:
    """Read a file in frames of up to `BATCH_ROWS` rows.

    Args:
        path: a file in one of the supported formats.
        columns: the name of the column for each requested field. Plain text has no columns; the
            only field is then `text`.
        optional: fields whose column may be missing.
        text_row: one row of plain text: `line` or `file`.
        advance: called with the number of bytes of the file read since the last call.

    Yields:
        Frames with these columns. Per field, its text (null if missing) and `<field>_kind`: `text`,
        `integer`, `number`, `boolean`, `list`, `object`, `missing`, `undecodable` (bytes that are
        not UTF-8, shown as U+FFFD in the text) or the name of another type. `problem`: why the row
        is malformed, otherwise null. `warning`: why the row is doubtful, otherwise null. `file`
        and `row`.

    Raises:
        UserError: with the file, and the line and column if they are known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(explain_missing_file(path))
    if suffix_of(path) not in SUFFIXES:
        shown = path.suffix or "(none)"
        known = f"{', '.join(SUFFIXES)}, each also with {', '.join(COMPRESSIONS)}"
        raise UserError(f"{path}: the suffix {shown} is not supported; use one of {known}")
    _require_columns(path, columns, frozenset(optional))
    if suffix_of(path) == ".txt":
        columns = dict.fromkeys(columns, "text")
    rows = parse_file(path, columns, text_row, advance)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield _frame(batch, columns, path)


def _frame(batch: list[Row], columns: Mapping[str, str], path: Path) -> pd.DataFrame:
    frame: dict[str, Any] = {}
    clean = _without_nulls if suffix_of(path) == ".parquet" else lambda cell: cell
    for field, column in columns.items():
        cells = [_normalize(clean(row.cells.get(column))) for row in batch]
        values, kinds = zip(*cells, strict=True)
        frame[field] = pd.array(values, dtype="str")
        frame[f"{field}_kind"] = pd.array(kinds, dtype="str")
    frame["problem"] = pd.array([row.problem for row in batch], dtype="str")
    frame["warning"] = pd.array([row.warning for row in batch], dtype="str")
    frame["row"] = [row.number for row in batch]
    return pd.DataFrame(frame).assign(file=pd.array([path.as_posix()] * len(batch), dtype="str"))


def _without_nulls(cell: Any) -> Any:
    """Return a cell of Parquet without the null fields of its structs.

    All structs of a column have all fields, so null is the only way to leave one out.
    """
    if isinstance(cell, dict):
        return {key: _without_nulls(value) for key, value in cell.items() if value is not None}
    return [_without_nulls(item) for item in cell] if isinstance(cell, list) else cell


def _normalize(cell: Any) -> tuple[str | None, str]:
    """Return a cell as text, and its kind."""
    if isinstance(cell, str):
        return (cell, "text") if cell.isascii() else _normalize_unicode(cell)
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
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can contain, becomes U+FFFD
        return cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "text"


def _require_columns(path: Path, columns: Mapping[str, str], optional: frozenset[str]) -> None:
    required = {field: column for field, column in columns.items() if field not in optional}
    if suffix_of(path) == ".txt":
        if list(columns) != ["text"]:
            needed = " and ".join(columns)
            raise UserError(
                f"{path} is plain text and has no columns; use a format with columns for {needed}"
            )
        return
    names = _column_names(path, required.values())
    missing = [(field, column) for field, column in required.items() if column not in names]
    if missing:
        listed = " and ".join(
            f"{quote(column)} ({_param(field)}){suggest(column, names)}"
            for field, column in missing
        )
        shown = ", ".join(map(quote, names[:30])) or "none"
        one_column = len(names) == 1 and suffix_of(path) == ".csv"
        hint = "; separate the cells by commas" if one_column else ""
        raise UserError(f"{path} has no column {listed}; its columns: {shown}{hint}")


def _param(field: str) -> str:
    known = ("text", "label", "prompt", "completion", "messages")
    return f"data.{field}_column" if field in known else "in data.prompt_template"


def _column_names(path: Path, wanted: Iterable[str]) -> list[str]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        with open_parquet(path, {}) as file:
            return file.schema_arrow.names
    names: dict[str, None] = {}
    empty = True
    wanted = list(wanted)
    for row in parse_file(path, {name: name for name in wanted}, "line", lambda size: None):
        empty = False
        names.update(dict.fromkeys(row.cells))
        if names.keys() >= set(wanted) or (suffix in DELIMITERS and row.cells):
            break  # otherwise read on: a later JSON object may have more keys
    # If no row is valid JSON, the error is the malformed rows and not a missing column.
    return list(names) if names or empty else list(wanted)


def require_optional_columns(files: Iterable[Path], columns: Iterable[str]) -> None:
    """Raise UserError if no file has an optional column of the prompt template.

    A name that is misspelled would otherwise be an empty column of every row.
    """
    missing = set(columns)
    names: dict[str, None] = {}
    for file in files:
        if not missing:
            return
        try:
            found = ["text"] if suffix_of(file) == ".txt" else _column_names(file, missing)
        except UserError:
            return  # the error is reported, with others, when the rows are read
        names.update(dict.fromkeys(found))
        missing -= set(found)
    if missing and names:
        listed = " and ".join(f"{quote(c)}{suggest(c, list(names))}" for c in sorted(missing))
        shown = ", ".join(map(quote, list(names)[:30]))
        raise UserError(
            f"data.prompt_template names the column {listed}, which no file has; their columns: "
            f"{shown}"
        )


def explain_missing_file(path: Path) -> str:
    """Return a message that `path` does not exist, with a similarly named file if there is one."""
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return f"{path} does not exist{suggest(path.name, names)}"
