"""Read the rows of JSON: a value per line, an array, or an object that holds the rows.

| content | rows |
|---|---|
| an object on each line (JSON Lines) | the objects |
| an array of objects | the objects |
| an array on each line, or in an array | named by the first one, or by `data.column_names` |
| an object with a list of objects in `data`, or in its only list | these objects |
| an object with a list, or an object by row number, for each column (pandas) | across the lists |
| an object with `columns` and `data` (pandas, `orient="split"`) | the arrays in `data` |
| an object with an object for each row (pandas, `orient="index"`) | these objects |
| one object with the columns | the object |
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.rows import Row, cell_of
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes
from gptj8.runtime.messages import listed, one_line, quote

_MAX_BYTES = 1 << 29
_NOT_AN_OBJECT = "is not a JSON object, such as {...}"


def parse_json(text: io.TextIOWrapper, path: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of JSON; a value that is no row has a `problem`.

    Raises:
        UserError: if the file as a whole is not JSON, or not of a shape that is read.
    """
    lines = ((number, line) for number, line in enumerate(text, 1) if not line.isspace())
    first = list(itertools.islice(lines, 2))
    if not first:
        return
    (number, line), *others = first
    is_array = line.lstrip().startswith("[")
    is_complete, value = _attempt(line)
    if not is_complete and (is_array or _may_span_lines(line, path)):
        size = path.stat().st_size
        if size > _MAX_BYTES:
            kind = "array" if is_array else "object"
            raise UserError(
                f"{path} is a JSON {kind} of {format_bytes(size)}, too large to read into memory; "
                "convert it to JSON Lines, with one object per line"
            )
        content = text.read()
        try:
            value = _read("".join([line, *(other for _, other in others), content]), path, number)
        except UserError:
            if is_array or not others or not _attempt(others[0][1])[0]:
                raise
            # JSON Lines whose first line is damaged
            rest = enumerate(io.StringIO(content, newline=""), others[0][0] + 1)
            lines = ((n, other) for n, other in rest if not other.isspace())
        else:
            yield from _rows_of(value, path, options)
            return
    elif is_complete and not others:
        value = _read(line, path, number) if value is None else value
        yield from _rows_of(value, path, options, number)
        return
    rows = itertools.chain(first, lines)
    if is_array:
        yield from _rows_of_arrays(((n, _read(row, path, n)) for n, row in rows), path, options)
    else:
        yield from _rows_of_lines(rows, frozenset(options.columns.values()))


def _may_span_lines(line: str, path: Path) -> bool:
    """Return whether the first line may begin an object that is the file's only value.

    In JSON Lines, a damaged first line is a damaged row.
    """
    return line.startswith("{") and (".json" in path.suffixes or line.strip() == "{")


def _rows_of_lines(lines: Iterator[tuple[int, str]], read: frozenset[str]) -> Iterator[Row]:
    """Yield the rows of JSON Lines."""
    for number, line in lines:
        try:
            value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            yield Row(number, {}, f"is not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # such as 5,000 digits or 1,000 brackets
            yield Row(number, {}, f"is not usable JSON: {one_line(error).partition(';')[0]}")
        else:
            yield _row_of(number, value, read)


def _attempt(line: str) -> tuple[bool, Any]:
    """Return whether a line is a complete value, and the value; None if it is not usable."""
    try:
        return True, json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError:
        return False, None
    except (ValueError, RecursionError):
        return True, None


def _read(content: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno + first_line - 1} column {error.colno}"
        hint = ""
        if error.msg == "Extra data" and content.lstrip().startswith("{"):
            hint = "; use JSON Lines with one object per line, or a JSON array in brackets"
        raise UserError(f"{path} {where} is not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error).partition(";")[0]
        raise UserError(f"{path} line {first_line} is not usable JSON: {reason}") from None


def _rows_of(value: Any, path: Path, options: ReadOptions, first_number: int = 1) -> Iterator[Row]:
    """Yield the rows of a file that is one value."""
    if isinstance(value, dict):
        value = _rows_in_object(value, path, options)
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        yield from _rows_of_arrays(enumerate(value, 1), path, options)
        return
    read = frozenset(options.columns.values())
    values = value if isinstance(value, list) else [value]
    for number, item in enumerate(values, first_number if len(values) == 1 else 1):
        yield _row_of(number, item, read)


def _rows_in_object(value: dict[str, Any], path: Path, options: ReadOptions) -> list[Any]:
    """Return the rows that one object holds."""
    wanted = list(options.required.values())
    split = [value.get("columns"), value.get("data")]
    if all(isinstance(part, list) for part in split) and set(value) <= {"columns", "data", "index"}:
        return [value["columns"], *value["data"]]
    columns = [value.get(name) for name in wanted]
    if all(isinstance(column, list) for column in columns) and not _is_row(value, options):
        return _across(value, path)
    if all(isinstance(column, dict) for column in columns) and not _is_row(value, options):
        numbers = list(dict.fromkeys(key for column in columns if column for key in column))
        dicts = {name: column for name, column in value.items() if isinstance(column, dict)}
        return _across({n: [c.get(key) for key in numbers] for n, c in dicts.items()}, path)
    if all(cell_of(value, name) is not None for name in wanted):
        return [value]
    if value and all(isinstance(item, dict) and {*wanted} <= {*item} for item in value.values()):
        return list(value.values())
    lists = {
        key: item for key, item in value.items()
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)
    }  # fmt: skip
    if "data" in lists or len(lists) == 1:
        return lists.get("data") or next(iter(lists.values()))
    if len(lists) > 1:
        raise UserError(
            f"{path} is a JSON object with rows in {listed(list(lists), 10)}; write each list to a "
            "file of its own"
        )
    return [value]


def _is_row(value: dict[str, Any], options: ReadOptions) -> bool:
    """Return whether lists in an object are cells, as those of a conversation are."""
    return (
        "messages" in options.columns
        and len(options.required) == 1
        and not all(
            isinstance(item, list) and all(isinstance(part, list) for part in item)
            for item in [value.get(options.columns["messages"])]
        )
    )


def _across(columns: dict[str, Any], path: Path) -> list[Any]:
    """Return the rows of columns that are lists of the same length."""
    lists = {name: column for name, column in columns.items() if isinstance(column, list)}
    lengths = Counter(map(len, lists.values()))
    if len(lengths) != 1:
        shown = ", ".join(f"{quote(name)} {len(column)}" for name, column in lists.items())
        raise UserError(f"{path} has columns of different lengths: {shown}")
    return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]


def _rows_of_arrays(
    arrays: Iterable[tuple[int, Any]], path: Path, options: ReadOptions
) -> Iterator[Row]:
    """Yield the rows of arrays whose names are in the first array or in the params."""
    names: Sequence[str] | None = options.column_names
    wanted = set(options.required.values())
    conversations = options.columns.get("messages")
    for number, value in arrays:
        if conversations and isinstance(value, list) and _is_conversation(value):
            yield Row(number, {conversations: value})
            continue
        if names is None:
            if any(isinstance(item, dict) for item in value):
                raise UserError(f"{path} line {number + 1} is not valid JSON: Extra data")
            if not wanted <= {name for name in value if isinstance(name, str)}:
                raise UserError(
                    f"{path} has arrays and not objects; name their columns in data.column_names"
                )
            names = value
            continue
        if not isinstance(value, list):
            yield Row(number, {}, "is not a JSON array, as the first one is")
        elif len(value) != len(names):
            yield Row(number, {}, f"has {len(value)} items, but there are {len(names)} names")
        else:
            yield Row(number, dict(zip(names, value, strict=True)))


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(item, dict) and not {"role", "from"}.isdisjoint(item) for item in value
    )


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


def _row_of(number: int, value: Any, read: frozenset[str]) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, _NOT_AN_OBJECT)
    repeated = value.repeated if isinstance(value, _Ambiguous) else ()
    keys = [key for key in repeated if key in read]
    keys += filter(None, (_repeated_key(cell_of(value, column)) for column in read))
    if keys:
        return Row(number, {}, f"has the key {quote(keys[0])} twice")
    return Row(number, value)
