"""Read the rows of Parquet and Arrow files, which have typed columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.rows import Row, check_names, outermost
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

BATCH_ROWS = 4096
COLUMNAR = (".parquet", ".arrow")


class _Table(NamedTuple):
    """An open file: its schema, its number of rows if known, and its batches of some columns."""

    schema: pa.Schema
    rows: int | None
    batches: Callable[[list[str]], Iterator[pa.RecordBatch]]


def columnar_names(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet or Arrow file."""
    with _open(path, ()) as table:
        return list(table.schema.names)


def columnar_types(path: Path) -> dict[str, pa.DataType]:
    """Return the types of the columns whose cells are read as they are stored.

    Labels that are stored as numbers are read by their names.
    """
    with _open(path, ()) as table:
        named = _label_names(table.schema, table.schema.names)
        return {field.name: field.type for field in table.schema if field.name not in named}


def parse_columnar(
    path: Path, options: ReadOptions, advance: Callable[[int], object]
) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file.

    Raises:
        UserError: if it is not such a file.
    """
    with _open(path, options.columns.values()) as table:
        present = table.schema.names
        outer = (outermost(name, present) for name in options.columns.values())
        wanted = [name for name in dict.fromkeys(outer) if name in present]
        names_of = _label_names(table.schema, wanted)
        number, size, position = 0, path.stat().st_size, 0
        for batch in table.batches(wanted):
            cells = {name: _cells(batch.column(name)) for name in wanted}
            for name in wanted:
                if pa.types.is_nested(table.schema.field(name).type):
                    cells[name] = list(map(_without_nulls, cells[name]))
            for name, known in names_of.items():
                cells[name] = [_named(cell, known) for cell in cells[name]]
            for values in zip(*cells.values(), strict=True):
                number += 1
                yield Row(number, dict(zip(cells, values, strict=True)))
            if table.rows:
                advance(size * number // table.rows - position)
                position = size * number // table.rows
        advance(size - position)


def _without_nulls(cell: Any) -> Any:
    """Return a cell without the null fields of its structs.

    All structs of a column have all fields, so null is the only way to leave one out.
    """
    if isinstance(cell, dict):
        return {key: _without_nulls(value) for key, value in cell.items() if value is not None}
    return [_without_nulls(item) for item in cell] if isinstance(cell, list) else cell


@contextmanager
def _open(path: Path, read: Iterable[str]) -> Iterator[_Table]:
    suffix = path.suffix.lower()
    if suffix not in COLUMNAR:
        kind = Path(path.stem).suffix.lower().lstrip(".").capitalize()
        raise UserError(f"{path}: compressed {kind} is not supported; unpack {suffix} first")
    kind = suffix.lstrip(".").capitalize()
    try:
        file = pq.ParquetFile(path) if suffix == ".parquet" else _open_arrow(path)
        schema = file.schema_arrow if suffix == ".parquet" else file.schema
        check_names(schema.names, path, read)
    except UnicodeDecodeError:
        raise UserError(f"{path}: the column names are not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is not {_an(kind)} file: {one_line(error)}") from None
    with file:
        if suffix == ".parquet":
            rows = file.metadata.num_rows
            yield _Table(schema, rows, lambda names: file.iter_batches(BATCH_ROWS, columns=names))
        else:
            yield _Table(schema, None, lambda names: _arrow_batches(file, names))


def _an(kind: str) -> str:
    return f"an {kind}" if kind[0] == "A" else f"a {kind}"


def _open_arrow(path: Path) -> Any:
    """Open an Arrow file in the stream format, as `datasets` writes it, or in the file format."""
    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.OSFile(str(path), "rb")
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _arrow_batches(file: Any, names: list[str]) -> Iterator[pa.RecordBatch]:
    is_file = isinstance(file, pa.ipc.RecordBatchFileReader)
    batches = map(file.get_batch, range(file.num_record_batches)) if is_file else iter(file)
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.select(names).slice(start, BATCH_ROWS)


def _label_names(schema: pa.Schema, columns: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return the label names by number of each column of `datasets.ClassLabel` or lists of it."""
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}  # damaged metadata, or newer than this library: keep the numbers
    items = {name: getattr(features[name], "feature", features[name]) for name in columns}
    return {
        name: dict(enumerate(item.names))
        for name, item in items.items()
        if isinstance(item, ClassLabel)
    }


def _named(cell: Any, known: dict[int, str]) -> Any:
    """Return the names of a label or a list of labels; an unknown number stays a number."""
    if isinstance(cell, list):
        return [known.get(item, item) for item in cell]
    return known.get(cell, cell)


def _cells(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells]
    except (OverflowError, ValueError):  # dates outside Python's range, which are not text anyway
        return column.cast(pa.int64()).to_pylist()
