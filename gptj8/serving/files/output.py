"""Write rows with their answers as CSV, JSON Lines or Parquet.

The same rows and answers give the same bytes. Cells are written as they are, also those that a
spreadsheet would run as a formula: the file is data, and reading it back must give the same values.
"""

from __future__ import annotations

import base64
import csv
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.readers.rows import text_and_kind
from gptj8.runtime.errors import UserError

Cells = Mapping[str, Any]


class RowWriter(Protocol):
    """Writes the rows of an output file in batches."""

    def write(self, rows: Sequence[Cells]) -> None:
        """Write rows; a column that a row lacks is left out, empty or null."""

    def close(self) -> None:
        """Complete the file."""


class ColumnTypes:
    """Find the Parquet type of each column from all of its cells.

    A column whose cells have no common type, such as texts and lists, becomes text: cells that are
    not text are written as JSON.

    Args:
        known: types that are known beforehand, from a file with typed columns.
    """

    def __init__(self, known: Mapping[str, pa.DataType]) -> None:
        self._known = dict(known)
        self._found: dict[str, pa.DataType] = {}

    def add(self, rows: Sequence[Cells]) -> None:
        """Take more rows into account."""
        names = dict.fromkeys(name for row in rows for name in row)
        for name in names:
            if name not in self._known:
                found = _type_of([_storable(row.get(name)) for row in rows])
                self._found[name] = _common_type(self._found.get(name, pa.null()), found)

    def of(self, name: str) -> pa.DataType:
        """Return the type of a column."""
        return self._known.get(name) or self._found.get(name, pa.string())


def suffix_of_output(path: Path) -> str:
    """Return the suffix of an output file.

    Raises:
        UserError: if it is not that of a supported format.
    """
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(
            f"--output {path}: the suffix {path.suffix or '(none)'} is not supported; use one of "
            f"{', '.join(_WRITERS)}"
        )
    return suffix


def open_output(
    path: Path, suffix: str, names: Sequence[str], types: Mapping[str, pa.DataType]
) -> RowWriter:
    """Return a writer.

    Args:
        path: the file to write.
        suffix: `.csv`, `.jsonl` or `.parquet`.
        names: the columns.
        types: their types, for Parquet.
    """
    return _WRITERS[suffix](path, names, types)


class _CsvWriter:
    def __init__(self, path: Path, names: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self._names = names
        self._file = open(path, "w", newline="", encoding="utf-8")  # see `close`
        self._plain = csv.writer(self._file, lineterminator="\n")
        # Python's writer does not quote a carriage return, which readers take for the row's end.
        self._quoted = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._row(names)

    def write(self, rows: Sequence[Cells]) -> None:
        for row in rows:
            self._row([_as_text(row.get(name)) for name in self._names])

    def close(self) -> None:
        self._file.close()

    def _row(self, cells: Sequence[str]) -> None:
        has_return = any("\r" in cell for cell in cells)
        (self._quoted if has_return else self._plain).writerow(cells)


class _JsonWriter:
    def __init__(self, path: Path, names: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self._file = open(path, "w", newline="", encoding="utf-8")  # see `close`

    def write(self, rows: Sequence[Cells]) -> None:
        for row in rows:
            self._file.write(_as_json(dict(row)) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    def __init__(self, path: Path, names: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self._schema = pa.schema([(name, types[name]) for name in names])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: Sequence[Cells]) -> None:
        arrays = [_array([row.get(f.name) for row in rows], f.type) for f in self._schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


_WRITERS: dict[str, Any] = {".csv": _CsvWriter, ".jsonl": _JsonWriter, ".parquet": _ParquetWriter}


def _array(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array([None if cell is None else _as_text(cell) for cell in cells], kind)
    return pa.array(list(map(_storable, cells)), kind)


def _type_of(cells: Iterable[Any]) -> pa.DataType:
    try:
        found = pa.array(list(cells)).type
    except (pa.ArrowException, OverflowError):
        return pa.string()
    return pa.string() if _has_empty_struct(found) else found


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Return whether a type contains objects without keys, which Parquet cannot store."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(field.type) for field in kind)
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("cell", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _storable(cell: Any) -> Any:
    """Return a cell with valid Unicode, at any depth."""
    if isinstance(cell, str):
        return text_and_kind(cell)[0]
    if isinstance(cell, dict):
        return {_storable(key): _storable(value) for key, value in cell.items()}
    return list(map(_storable, cell)) if isinstance(cell, list) else cell


def _as_text(cell: Any) -> str:
    """Return a cell as text; an empty string if it is missing."""
    plain = _as_plain(cell)
    if plain is None:
        return ""
    return plain if isinstance(plain, str) else _as_json(plain)


def _as_json(value: Any) -> str:
    return json.dumps(_as_plain(value), ensure_ascii=False, allow_nan=False)


def _as_plain(cell: Any) -> Any:
    """Return a cell as a value of JSON."""
    if isinstance(cell, str):
        return text_and_kind(cell)[0]
    if isinstance(cell, dict):
        return {str(_as_plain(key)): _as_plain(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return list(map(_as_plain, cell))
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode()
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if isinstance(cell, Decimal) or not _is_json(cell) else cell


def _is_json(cell: Any) -> bool:
    return cell is None or isinstance(cell, bool | int)
