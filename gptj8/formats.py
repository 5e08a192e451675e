"""From a file to rows: CSV, TSV, JSON Lines, JSON, Parquet and plain text.

Every format ends in the same frame: a column for each field asked for, a `<field>_kind` beside it
that says what the cell was in the file, and `file` and `row`, by which a person finds it again.
`row` counts from 1: lines of JSON Lines and plain text, elements of a JSON array, rows of Parquet,
and records of CSV and TSV, whose header is not counted and whose quoted cells may span lines.

A plain text file is one row a line, blank lines left out. A JSON array is read whole; everything
else is streamed into an Arrow file by `datasets`. Its own CSV and JSON builders are not used, tried
and rejected: a CSV line with one cell too many shifts every column without a word, a blank line in
JSON Lines ends in `Expected object or value`, mixed types are cast, and no error names its line.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_DELIMITERS, *_JSON, ".parquet", ".txt")

_Row = tuple[int, Mapping[str, Any]]


def read_rows(path: str | Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read one file.

    Args:
        path: a file in one of the formats.
        columns: the fields wanted, each with the name of its column; a plain text file has no
            columns and gives its lines for the single field `text`.

    Returns:
        For each field its text (null where the file has none) and `<field>_kind`: `text`,
        `integer`, `number`, `boolean`, `list`, `object`, `missing` or another type's name; and
        `file` and `row`.

    Raises:
        UserError: naming the file, and the line where it is known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(explain_missing_file(path))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: {suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
    _require_columns(path, columns)
    read = _read_parquet if suffix == ".parquet" else _read_text_format
    with tempfile.TemporaryDirectory(prefix="gptj8-") as cache, _quiet_unless_terminal():
        rows = read(path, columns, cache)
    rows["file"] = path.as_posix()
    return rows


def _require_columns(path: Path, columns: Mapping[str, str]) -> None:
    if path.suffix.lower() == ".txt":
        if list(columns) != ["text"]:
            needed = " and ".join(columns)
            raise UserError(f"{path} is plain text and has no columns, but {needed} are needed")
        return
    names = _column_names(path, columns.values())
    missing = [(field, column) for field, column in columns.items() if column not in names]
    if missing:
        listed = " and ".join(
            f"{_quote(column)} (data.{field}_column){_suggest(column, names)}"
            for field, column in missing
        )
        shown = ", ".join(map(_quote, names[:30])) or "none"
        alone = len(names) == 1 and path.suffix.lower() == ".csv"
        hint = "; are its cells separated by commas?" if alone else ""
        raise UserError(f"{path} has no column {listed}; its columns: {shown}{hint}")


def _column_names(path: Path, wanted: Iterable[str]) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            return pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a Parquet file: {_one_line(error)}") from None
    names: dict[str, None] = {}
    for _, cells in _rows_of(path):
        names.update(dict.fromkeys(cells))
        if suffix in _DELIMITERS or names.keys() >= set(wanted):
            break  # a JSON object may lack a key that a later one has
    return list(names)


def _read_text_format(path: Path, columns: Mapping[str, str], cache: str) -> pd.DataFrame:
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    if path.suffix.lower() == ".txt":
        columns = {"text": "text"}
    features = {
        name: Value("large_string") for field in columns for name in (field, f"{field}_kind")
    }
    try:
        dataset = Dataset.from_generator(
            _normalized_rows,
            features=Features(features | {"row": Value("int64")}),
            cache_dir=cache,
            gen_kwargs={"path": path, "columns": dict(columns)},
        )
    except DatasetGenerationError as error:
        raise _mendable(path, error.__cause__) from None
    return dataset.to_pandas()


def _normalized_rows(path: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for row, cells in _rows_of(path):
        normalized: dict[str, Any] = {"row": row}
        for field, column in columns.items():
            normalized[field], normalized[f"{field}_kind"] = _normalize(cells.get(column))
        yield normalized


def _read_parquet(path: Path, columns: Mapping[str, str], cache: str) -> pd.DataFrame:
    from datasets import ClassLabel, Dataset
    from datasets.exceptions import DatasetGenerationError

    if not pq.read_metadata(path).num_rows:
        raise UserError(f"{path} has no rows")
    try:
        names = list(dict.fromkeys(columns.values()))
        dataset = Dataset.from_parquet(str(path), columns=names, cache_dir=cache)
    except DatasetGenerationError as error:
        raise _mendable(path, error.__cause__) from None
    rows: dict[str, Any] = {}
    for field, column in columns.items():
        cells = dataset.data.column(column).to_pylist()
        feature = dataset.features[column]
        if isinstance(feature, ClassLabel):  # the Hub's way to store labels: numbers with names
            known = dict(enumerate(feature.names))
            cells = [known.get(cell) for cell in cells]
        values, kinds = zip(*map(_normalize, cells), strict=True)
        rows[field] = pd.array(values, dtype="str")
        rows[f"{field}_kind"] = pd.array(kinds, dtype="str")
    return pd.DataFrame(rows).assign(row=range(1, dataset.num_rows + 1))


def _normalize(cell: Any) -> tuple[str | None, str]:
    """Return a cell as text, and what it was."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None, "missing"
    if isinstance(cell, str):
        try:
            cell.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell: to U+FFFD
            cell = cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return cell, "text"
    if isinstance(cell, bool):
        return json.dumps(cell), "boolean"
    if isinstance(cell, int):
        return str(cell), "integer"
    if isinstance(cell, float):  # a column of integers with a gap is stored as floats
        return (str(int(cell)), "integer") if cell.is_integer() else (repr(cell), "number")
    if isinstance(cell, list | dict):
        kind = "list" if isinstance(cell, list) else "object"
        return json.dumps(cell, ensure_ascii=True, default=str), kind
    return str(cell), type(cell).__name__


def _mendable(path: Path, cause: BaseException | None) -> Exception:
    if isinstance(cause, UserError) or (isinstance(cause, OSError) and cause.errno is not None):
        return cause
    return UserError(f"{path} cannot be read: {_one_line(cause)}")


# --- parsing -------------------------------------------------------------------------------------


def _rows_of(path: Path) -> Iterator[_Row]:
    """Yield row number and cells by column name.

    Raises:
        UserError: if the file is empty, is not UTF-8 or does not follow its format.
    """
    with open(path, "rb") as stream:
        head = stream.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:2].count(0) == 1:
        raise UserError(f"{path} is UTF-16 and not UTF-8; save it as UTF-8")
    suffix = path.suffix.lower()
    parse: Callable[[Path], Iterator[_Row]] = _parse_json
    if suffix in _DELIMITERS:
        parse = _parse_delimited
    elif suffix == ".txt":
        parse = _parse_lines
    empty = True
    try:
        for row in parse(path):
            empty = False
            yield row
    except UnicodeDecodeError:
        raise UserError(_undecodable(path)) from None
    if empty:
        raise UserError(f"{path} has no rows" if head else f"{path} is empty")


def _parse_delimited(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=_DELIMITERS[path.suffix.lower()], strict=True)
        header: list[str] | None = None
        row = line = 0
        try:
            for cells in reader:
                line, start = reader.line_num, line + 1
                if len(cells) < 2 and not "".join(cells).strip():
                    continue  # a blank line
                if header is None:
                    header = cells
                    repeated = sorted({name for name in header if header.count(name) > 1})
                    if repeated:
                        names = ", ".join(map(_quote, repeated))
                        raise UserError(f"{path} has more than one column {names}")
                    continue
                if len(cells) != len(header):
                    sizes = f"{len(cells)} cells, the header has {len(header)}"
                    more = len(cells) > len(header)
                    hint = "; a cell that holds the separator needs quotes" if more else ""
                    raise UserError(f"{path} line {start} has {sizes}{hint}")
                row += 1
                yield row, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            what = str(error)
            if "unexpected end" in what:
                what = "a quote is opened and never closed"
            elif "expected after" in what:
                what = "text follows a closing quote; a quote inside a cell is written twice"
            raise UserError(f"{path} line {line + 1}: {what}") from None


def _parse_json(path: Path) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig") as stream:
        first = next((line for line in stream if line.strip()), "").lstrip()
        stream.seek(0)
        if first.startswith("["):
            rows: Iterable[tuple[int, Any]] = enumerate(_load_json(stream.read(), path, None), 1)
            place = "element"
        else:
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            rows = ((number, _load_json(line, path, number)) for number, line in lines)
            place = "line"
        for number, value in rows:
            if not isinstance(value, dict):
                raise UserError(f"{path} {place} {number} is not a JSON object, such as {{...}}")
            yield number, value


def _load_json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno} column {error.colno}"
        hint = ""
        if line == 1 and text.strip() == "{":
            hint = "; JSON Lines has an object on each line, a JSON array stands in brackets"
        raise UserError(f"{path} {where} is not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        reason = _one_line(error).partition(";")[0]
        raise UserError(f"{path} line {line or 1} is not usable JSON: {reason}") from None


def _parse_lines(path: Path) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def _undecodable(path: Path) -> str:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"{path} line {number}: byte 0x{byte:02X} is not UTF-8; save it as UTF-8"
    return f"{path} is not UTF-8; save it as UTF-8"


# --- words ---------------------------------------------------------------------------------------


def explain_missing_file(path: Path) -> str:
    """Return that `path` does not exist, and which file near it may have been meant."""
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return f"{path} does not exist{_suggest(path.name, names)}"


def _suggest(name: str, known: Iterable[str]) -> str:
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f", did you mean {_quote(by_lower_case[close[0]])}?" if close else ""


def _quote(name: str) -> str:
    """Quote a name only where it would be misread without."""
    plain = name and name.isprintable() and not any(c in name for c in " ,;'\"")
    return name if plain else repr(name)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Progress bars are for people: in a log file they bury the one line that matters."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
