"""Parse files into rows, each a mapping from column to cell; one parser per format.

All formats are streamed, except a JSON array, which is read into memory. A malformed row has a
`problem`; an error is raised only when the rest of the file cannot be read.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.readers.csv_quotes import find_quote_problem
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes
from gptj8.runtime.messages import counted, one_line, quote

BATCH_ROWS = 4096
"""Small enough that a batch of long texts needs little memory, large enough to vectorize."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet", ".txt")

_MULTIBYTE = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")
_NOT_WINDOWS_1252 = b"\x81\x8d\x8f\x90\x9d"
_MAX_CELL = 1 << 26
_MAX_ARRAY_BYTES = 1 << 29


@dataclass(frozen=True)
class Row:
    """A parsed row: its cells by column, or a `problem`; a `warning` marks a doubtful row."""

    number: int
    cells: Mapping[str, Any]
    problem: str | None = None
    warning: str | None = None


class EmptyFileError(UserError):
    """A file has no rows, which is harmless if other files have some."""


def suffix_of(path: Path) -> str:
    """Return the suffix of the format in lower case: `.jsonl` for `train.JSONL.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def parse_file(
    path: Path, columns: Mapping[str, str], text_row: str, advance: Callable[[int], object]
) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        UserError: if the file is empty, is not UTF-8 or does not follow its format.
    """
    suffix = suffix_of(path)
    empty = True
    try:
        if suffix == ".parquet":
            rows = _parse_parquet(path, columns, advance)
        else:
            with _open(path) as (stream, _):
                head = stream.read(4)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:2].count(0) == 1:
                raise UserError(f"{path} is UTF-16; save it as UTF-8")
            rows = _parse_text_format(path, columns, text_row, advance)
        for row in rows:
            empty = False
            yield row
    except (EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be decompressed: {one_line(error)}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = "read" if suffix == ".parquet" else "decompressed"
        raise UserError(f"{path} cannot be {what}: {one_line(error)}") from None
    if empty:
        nothing = suffix != ".parquet" and not head
        raise EmptyFileError(f"{path} is empty" if nothing else f"{path} has no rows")


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the decompressed content as a stream, and the raw file for tracking progress."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with open(path, "rb") as raw:
        if compression is None:
            yield raw, raw
        elif compression == "xz":
            with lzma.open(raw) as stream:
                yield stream, raw  # type: ignore[misc]
        else:
            source = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
            with io.BufferedReader(source) as stream:
                yield stream, raw  # type: ignore[misc]


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file: UTF-8, or Windows-1252, which includes Latin-1.

    A file is Windows-1252 if it has bytes that are not UTF-8 and no character of several bytes that
    is. With both, parts of the file have different encodings, and it is read as UTF-8.
    """
    status = path.stat()
    return _encoding_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _encoding_of(path: Path, size: int, changed: int) -> str:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    has_others = False
    with _open(path) as (stream, _):
        while chunk := stream.read(1 << 20):
            if chunk.isascii() and not decoder.getstate()[0]:
                continue
            text = decoder.decode(chunk)
            if _MULTIBYTE.search(text):
                return "utf-8-sig"
            has_others = has_others or _is_undecodable(text)
            if any(byte in chunk for byte in _NOT_WINDOWS_1252):
                return "utf-8-sig"
    has_others = has_others or _is_undecodable(decoder.decode(b"", final=True))
    return "cp1252" if has_others else "utf-8-sig"


def _decode(stream: BinaryIO, encoding: str) -> io.TextIOWrapper:
    """Return a text stream that keeps line ends, and non-UTF-8 bytes as surrogates (PEP 383)."""
    return io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="")


def _parse_text_format(
    path: Path, columns: Mapping[str, str], text_row: str, advance: Callable[[int], object]
) -> Iterator[Row]:
    suffix = suffix_of(path)
    encoding = encoding_of(path)
    with _open(path) as (stream, raw):
        text = _decode(stream, encoding)
        if suffix in DELIMITERS:
            rows = _parse_delimited(text, path, columns)
        elif suffix == ".txt":
            rows = _parse_plain(text, text_row)
        else:
            rows = _parse_json(text, path, frozenset(columns.values()))
        position = 0
        for index, row in enumerate(rows, 1):
            yield row
            if index % BATCH_ROWS == 0:
                advance(raw.tell() - position)
                position = raw.tell()
        advance(raw.tell() - position)
        text.detach()  # `_open` closes the stream


def _parse_delimited(
    text: io.TextIOWrapper, path: Path, columns: Mapping[str, str]
) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL)
    delimiter = DELIMITERS[suffix_of(path)]
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = line = 0
    try:
        for cells in reader:
            line, start = reader.line_num, line + 1
            # Skip blank lines. In a file with one column, an empty quoted cell is a row.
            if not cells or (len(cells) == 1 and not cells[0].strip() and len(header or ()) != 1):
                continue
            if header is None:
                header = cells
                _check_header(header, path, columns)
                continue
            number += 1
            if len(cells) == len(header):
                warning = _joined(cells, delimiter, start) if line > start else None
                yield Row(number, dict(zip(header, cells, strict=True)), warning=warning)
                continue
            found = counted(len(cells), "cell")
            problem = f"has {found} on line {start}, but the header has {len(header)}"
            if len(cells) > len(header):
                problem += "; quote cells that contain the separator"
            yield Row(number, {}, problem)
    except csv.Error as error:
        with _open(path) as (stream, _):
            lines = _decode(stream, encoding_of(path))
            place = find_quote_problem(itertools.islice(lines, line, None), delimiter, _MAX_CELL)
            lines.detach()
        if place is None:
            raise UserError(f"{path} line {line + 1}: {error}") from None
        where = f"line {line + place.line} column {place.column}"
        raise UserError(f"{path} {where}: {place.reason}") from None


def _joined(cells: Sequence[str], delimiter: str, line: int) -> str | None:
    """Return a warning if a cell looks like several rows joined by a stray pair of quotes.

    In such a cell, each inner line has as many separators as a complete row, and the first and last
    lines have those of the row parts after the opening quote and before the closing quote. Text
    with one comma per line looks the same, so CSV with two columns needs at least four lines.
    """
    others = len(cells) - 1
    least = 2 if delimiter == "\t" else 4 if others == 1 else 3
    for column, cell in enumerate(cells):
        counts = [part.count(delimiter) for part in cell.split("\n")]
        rows = [others - column, *[others] * (len(counts) - 2), column]
        if others and len(counts) >= least and counts == rows:
            return f"may be {len(counts)} rows joined by a stray quote on line {line}"
    return None


def _check_header(header: list[str], path: Path, columns: Mapping[str, str]) -> None:
    if any(_is_undecodable(name) for name in header):
        raise UserError(f"{path} line 1: the column names are not UTF-8; save it as UTF-8")
    _check_names(header, path, columns)


def _check_names(names: Sequence[str], path: Path, columns: Mapping[str, str]) -> None:
    """Raise an error if the name of a column that is read is repeated, which is ambiguous."""
    read = set(columns.values())
    repeated = sorted(name for name, count in Counter(names).items() if count > 1 and name in read)
    if repeated:
        listed = ", ".join(map(quote, repeated[:10]))
        raise UserError(f"{path} has repeated column names: {listed}")


def _parse_json(text: io.TextIOWrapper, path: Path, read: frozenset[str]) -> Iterator[Row]:
    lines = ((number, line) for number, line in enumerate(text, 1) if not line.isspace())
    first_number, first = next(lines, (0, ""))
    if first.lstrip().startswith("["):
        size = path.stat().st_size
        if size > _MAX_ARRAY_BYTES:
            raise UserError(
                f"{path} is a JSON array of {format_bytes(size)}, too large to read into memory; "
                "convert it to JSON Lines, with one object per line"
            )
        yield from _parse_json_array(first + text.read(), path, first_number, read)
        return
    if first.strip() == "{":
        raise UserError(
            f"{path} line {first_number} column 2 is not valid JSON; use JSON Lines with one "
            "object per line, or a JSON array in brackets"
        )
    for number, line in itertools.chain([(first_number, first)] if first else [], lines):
        try:
            value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            yield Row(number, {}, f"is not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # such as 5,000 digits or 1,000 brackets
            yield Row(number, {}, f"is not usable JSON: {one_line(error).partition(';')[0]}")
        else:
            yield _row_of(number, value, read)


class _Ambiguous(dict[str, Any]):
    """An object with repeated keys, of which `json` would keep only the last values."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    ambiguous = _Ambiguous(found)
    counts = Counter(key for key, _ in pairs)
    ambiguous.repeated = tuple(key for key, count in counts.items() if count > 1)
    return ambiguous


def _repeated_key(value: Any) -> str | None:
    """Return a repeated key of an object, at any depth."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, _Ambiguous):
            return value.repeated[0]
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return None


def _parse_json_array(
    text: str, path: Path, first_line: int, read: frozenset[str]
) -> Iterator[Row]:
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno + first_line - 1} column {error.colno}"
        raise UserError(f"{path} {where} is not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error).partition(";")[0]
        raise UserError(f"{path} line {first_line} is not usable JSON: {reason}") from None
    for number, value in enumerate(values, 1):
        yield _row_of(number, value, read)


def _row_of(number: int, value: Any, read: frozenset[str]) -> Row:
    if isinstance(value, dict):
        repeated = value.repeated if isinstance(value, _Ambiguous) else ()
        keys = [key for key in repeated if key in read]
        keys += filter(None, (_repeated_key(value.get(column)) for column in read))
        if keys:
            return Row(number, {}, f"has the key {quote(keys[0])} twice")
        return Row(number, value)
    return Row(number, {}, "is not a JSON object, such as {...}")


def _parse_plain(text: io.TextIOWrapper, text_row: str) -> Iterator[Row]:
    if text_row == "file":
        content = text.read().replace("\r\n", "\n")
        if content.strip():
            yield Row(1, {"text": content})
        return
    for number, line in enumerate(text, 1):
        if not line.isspace():
            yield Row(number, {"text": line.rstrip("\r\n")})


@contextmanager
def open_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[pq.ParquetFile]:
    if path.suffix.lower() != ".parquet":
        raise UserError(f"{path}: compressed Parquet is not supported; unpack {path.suffix} first")
    try:
        file = pq.ParquetFile(path)
        _check_names(file.schema_arrow.names, path, columns)
    except UnicodeDecodeError:
        raise UserError(f"{path}: the column names are not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is not a Parquet file: {one_line(error)}") from None
    with file:
        yield file


def _parse_parquet(
    path: Path, columns: Mapping[str, str], advance: Callable[[int], object]
) -> Iterator[Row]:
    with open_parquet(path, columns) as file:
        present = set(file.schema_arrow.names)
        wanted = [name for name in dict.fromkeys(columns.values()) if name in present]
        names_of = _label_names(file.schema_arrow, wanted)
        number, total = 0, file.metadata.num_rows
        size, position = path.stat().st_size, 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            cells = {name: _cells(batch.column(name)) for name in wanted}
            for name, known in names_of.items():
                cells[name] = [known.get(cell) for cell in cells[name]]
            for values in zip(*cells.values(), strict=True):
                number += 1
                yield Row(number, dict(zip(cells, values, strict=True)))
            advance(size * number // total - position)
            position = size * number // total


def _label_names(schema: pa.Schema, columns: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return the label names by number of each column of type `datasets.ClassLabel`."""
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}  # damaged metadata, or newer than this library: keep the numbers
    return {
        name: dict(enumerate(features[name].names))
        for name in columns
        if isinstance(features[name], ClassLabel)
    }


def _cells(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells]
    except (OverflowError, ValueError):  # dates outside Python's range, which are not text anyway
        return column.cast(pa.int64()).to_pylist()


def _is_undecodable(text: str) -> bool:
    """Return whether a text has surrogates that stand for non-UTF-8 bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
