"""Read files in batches of rows: tables, JSON, Parquet, Arrow and plain text.

Compressed files are supported. Every format gives the same frames: one column per requested field,
a column `<field>_kind` with the cell's type in the file, and `file` and `row`, which locate the
row. `row` counts from 1: lines of JSON Lines and plain text, elements of a JSON array, rows of
Parquet, and records of tables. The header of a table is not counted, and its quoted cells may span
lines. A malformed row (a line that is not JSON, a record with too many cells) has no cells and
gives the reason in `problem`; the other rows are still read. Damage that makes the rest of the file
unreadable, such as a quote that is never closed, raises an error.

Files are streamed, except a JSON array or object, which is read into memory. Alternative
considered: the CSV and JSON readers of `datasets`; they were rejected because a CSV line with one
extra cell silently shifts every column, a blank line in JSON Lines fails with `Expected object or
value`, mixed types are cast, and no error gives a line number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from gptj8.dataset.readers.columnar import BATCH_ROWS, COLUMNAR, columnar_names
from gptj8.dataset.readers.folders import SPLIT_OF, stem_of
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.parsers import SUFFIXES, is_plain, is_table, parse_file
from gptj8.dataset.readers.plain_text import choose_text_row, passage_size
from gptj8.dataset.readers.rows import (
    EmptyFileError,
    Row,
    cell_of,
    check_names,
    on_lines,
    outermost,
    text_and_kind,
)
from gptj8.dataset.readers.tables import table_format
from gptj8.dataset.readers.text_files import (
    COMPRESSIONS,
    TEXT_SUFFIXES,
    encoding_of,
    is_undecodable,
    open_text,
    reading,
    suffix_of,
)
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted, quote, suggest


def read_rows(path: str | Path, options: ReadOptions) -> pd.DataFrame:
    """Read a complete file into one frame; see `read_batches`."""
    return pd.concat(read_batches([Path(path)], options), ignore_index=True)


def read_texts(path: str | Path, column: str) -> pd.DataFrame:
    """Read a file of texts, which may be running text, into one frame; see `read_batches`."""
    options = ReadOptions({"text": column})
    text_row, _ = choose_text_row([Path(path)], options.borders, options.encoding)
    passage = passage_size(Path(path).stat().st_size) if Path(path).exists() else 1
    return read_rows(path, replace(options, text_row=text_row, passage=passage))


def describe_files(files: Sequence[Path], options: ReadOptions) -> list[str]:
    """Return lines on how files were read, where that was found out and is not as usual."""
    files_of: dict[str, list[Path]] = {}
    for path in files:
        for note in _notes(path, options):
            files_of.setdefault(note, []).append(path)
    return [
        f"{paths[0]} {note}"
        + (f" (and {counted(len(paths) - 1, 'more file')})" if len(paths) > 1 else "")
        for note, paths in files_of.items()
    ]


def _notes(path: Path, options: ReadOptions) -> Sequence[str]:
    if suffix_of(path) in COLUMNAR:
        return ()
    found: list[str] = []
    with suppress(UserError), reading(path, options.encoding):
        if options.encoding == "auto" and encoding_of(path) == "cp1252":
            found.append("is not UTF-8; it was read as Windows-1252")
        if is_table(path, options):
            found += table_format(path, options).notes
    return found


def with_format_of(path: Path, options: ReadOptions) -> ReadOptions:
    """Return options that read tables as the first one where they do not show their format.

    A small file may not show by itself that its first line is a row.
    """
    if not path.is_file() or not is_table(path, options) or options.column_names:
        return options
    try:
        with reading(path, options.encoding):
            found = table_format(path, options)
    except UserError:
        return options  # reported when the file is read
    if found.has_header or not found.delimiter:
        return options
    return replace(options, fallback=(found.delimiter, found.names or ()))


def read_batches(
    files: Sequence[Path],
    options: ReadOptions,
    advance: Callable[[int], object] = lambda size: None,
    errors: list[tuple[Path, UserError]] | None = None,
) -> Iterator[pd.DataFrame]:
    """Read files in frames of up to `BATCH_ROWS` rows; a frame may have rows of several files.

    Args:
        files: files in the supported formats.
        options: what to read.
        advance: called with the number of bytes that were read since the last call.
        errors: filled with the files that cannot be read and why, which is otherwise raised.

    Yields:
        Frames with these columns. Per field, its text (null if missing) and `<field>_kind`: `text`,
        `integer`, `number`, `boolean`, `list`, `object`, `missing`, `undecodable` (bytes that are
        not UTF-8, shown as U+FFFD in the text) or the name of another type. `problem`: why the row
        is malformed, otherwise null. `warning`: why the row is doubtful, otherwise null.
        `continues` and `next_row`: whether the text continues that of the row before, and the row
        that continues it, or 0. `file` and `row`.

    Raises:
        UserError: with the file, and the line and column if they are known.
    """
    rows = _rows(files, options, advance, errors)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield _frame(batch, options)


def _rows(
    files: Sequence[Path],
    options: ReadOptions,
    advance: Callable[[int], object],
    errors: list[tuple[Path, UserError]] | None,
) -> Iterator[tuple[Path, Row]]:
    for path in files:
        try:
            with reading(path, options.encoding):
                check_file(path, options)
            for row in parse_file(path, options, advance):
                yield path, row
        except UserError as error:
            if errors is None:
                raise
            errors.append((path, error))


def check_file(path: Path, options: ReadOptions) -> None:
    """Raise UserError if a file is missing, not supported or lacks a column."""
    if not path.exists():
        raise UserError(explain_missing_file(path))
    if suffix_of(path) not in (*SUFFIXES, *TEXT_SUFFIXES):
        advice = _ADVICE.get(suffix_of(path))
        known = f"{', '.join(SUFFIXES)}, each also with {', '.join(COMPRESSIONS)}"
        raise UserError(
            f"{path}: the suffix {path.suffix} is not supported; {advice or f'use one of {known}'}"
        )
    _require_columns(path, options)


def _frame(batch: list[tuple[Path, Row]], options: ReadOptions) -> pd.DataFrame:
    frame: dict[str, Any] = {}
    paths = [path for path, _ in batch]
    text_of = {path: path.as_posix() for path in dict.fromkeys(paths)}
    for field, column in options.columns.items():
        found = []
        for _, row in batch:
            cell = cell_of(row.cells, column)
            if isinstance(cell, list):
                cell = _from_list(cell, field, field in options.list_fields)
            found.append(text_and_kind(cell))
        values, kinds = zip(*found, strict=True)
        frame[field] = pd.array(values, dtype="str")
        frame[f"{field}_kind"] = pd.array(kinds, dtype="str")
    frame["problem"] = pd.array([row.problem for _, row in batch], dtype="str")
    frame["warning"] = pd.array([row.warning for _, row in batch], dtype="str")
    frame["continues"] = [row.continues for _, row in batch]
    frame["next_row"] = [row.next_row for _, row in batch]
    frame["row"] = [row.number for _, row in batch]
    frame["file"] = pd.array([text_of[path] for path in paths], dtype="str")
    return pd.DataFrame(frame)


_ANSWERS = ("label", "completion")
_CONLL = (
    "it looks like CoNLL's format, a word with its tag on each line; write a row for each sentence"
)
_ADVICE = dict.fromkeys((".conll", ".conllu", ".iob", ".bio"), _CONLL) | dict.fromkeys(
    (".zip", ".tar", ".7z", ".rar"), "unpack it first"
)


def _from_list(cell: list[Any], field: str, is_usual: bool) -> Any:
    """Return an answer that is the only item of a list, or the items of a list on lines.

    Labels are often in lists.
    """
    if field in _ANSWERS:
        return (cell or [None])[0] if len(cell) < 2 else cell
    text = on_lines(cell) if is_usual else None
    return cell if text is None else text


def _require_columns(path: Path, options: ReadOptions) -> None:
    if is_plain(path, options):
        return
    required = options.required
    names = column_names(path, options)
    missing = [(f, c) for f, c in required.items() if not has_column(c, names)]
    if missing:
        if is_table(path, options):
            with suppress(EmptyFileError):
                next(parse_file(path, options))  # a quote may have damaged the names
        listed = " and ".join(
            f"{quote(column)} ({_param(field)}){suggest(column, names)}"
            for field, column in missing
        )
        shown = ", ".join(map(quote, names[:30])) or "none"
        raise UserError(
            f"{path} has no column {listed}; its columns: {shown}"
            f"{_hint(path, options, names, {field for field, _ in missing})}"
        )


def has_column(column: str, names: Iterable[str]) -> bool:
    """Return whether a column, or the one that holds a nested one, is among the names."""
    return outermost(column, names) in names


def _hint(path: Path, options: ReadOptions, names: Sequence[str], missing: set[str]) -> str:
    """Return what may help if the columns of some fields are missing."""
    is_test = SPLIT_OF.get(stem_of(path).casefold()) == "test"
    if is_test and missing <= set(_ANSWERS) and len(options.required) > 1:
        return (
            "; the public test files of many benchmarks have no labels: name the files to read in "
            "data.train_files and data.validation_files"
        )
    if not is_table(path, options):
        nested = _nested_column(path, options)
        return f"; {nested} has lists of objects: write a row for each of them" if nested else ""
    if suffix_of(path) in TEXT_SUFFIXES and _is_tagged_words(path, options):
        return f"; {_CONLL}"
    if len(names) == 1 and suffix_of(path) in TEXT_SUFFIXES:
        return (
            "; it looks like running text, which data.task: text learns; to classify texts in "
            "files, put those of each label into a folder of its own, at least two of each"
        )
    if len(names) == 1:
        return "; if its cells are not separated by commas, set data.delimiter"
    if options.column_names is None and any(map(_is_unlike_a_name, names)):
        return "; its first line looks like a row: name the columns in data.column_names"
    return ""


def _nested_column(path: Path, options: ReadOptions) -> str | None:
    """Return a column of JSON that holds lists of objects, which may be the rows."""
    row = next(parse_file(path, options), None)
    for name, cell in (row.cells if row else {}).items():
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            return quote(name)
    return None


def _is_unlike_a_name(name: str) -> bool:
    return len(name) > 40 or len(name.split()) > 2 or name.strip().isdecimal()


def _is_tagged_words(path: Path, options: ReadOptions) -> bool:
    """Return whether the lines are words with tags, and blank lines separate sentences."""
    with open_text(path, options.encoding) as (text, _):
        lines = [line.split() for line in itertools.islice(text, 1000)]
    counts = {len(words) for words in lines if words}
    return len(counts) == 1 and counts.pop() > 1 and [] in lines[:-1]


def _param(field: str) -> str:
    known = ("text", "label", "prompt", "completion", "messages")
    return f"data.{field}_column" if field in known else "in data.prompt_template"


def column_names(path: Path, options: ReadOptions) -> list[str]:
    """Return the names of a file's columns; of JSON, those up to a row with all that are wanted.

    Raises:
        UserError: if the file cannot be read.
    """
    if suffix_of(path) in COLUMNAR:
        return columnar_names(path)
    if is_table(path, options):
        table = list(table_format(path, options).names or options.required.values())
        check_names(table, path, options.columns.values())
        if any(map(is_undecodable, table)):
            raise UserError(
                f"{path} line 1: the column names are not UTF-8; save it as UTF-8, or set "
                "data.encoding"
            )
        return table
    names: dict[str, None] = {}
    empty = True
    wanted = [outermost(column, ()) for column in options.required.values()]
    for row in parse_file(path, options):
        empty = False
        names.update(dict.fromkeys(row.cells))
        if names.keys() >= set(wanted):
            break  # otherwise read on: a later JSON object may have more keys
    # If no row is valid JSON, the error is the malformed rows and not a missing column.
    return list(names) if names or empty else list(wanted)


def require_optional_columns(
    files: Iterable[Path], options: ReadOptions, columns: Iterable[str]
) -> None:
    """Raise UserError if no file has an optional column of the prompt template.

    A name that is misspelled would otherwise be an empty column of every row.
    """
    missing = set(columns)
    names: dict[str, None] = {}
    for file in files:
        if not missing:
            return
        if is_plain(file, options):
            continue
        wanted = replace(options, columns={c: c for c in missing}, optional=frozenset())
        try:
            found = column_names(file, wanted)
        except UserError:
            return  # the error is reported, with others, when the rows are read
        names.update(dict.fromkeys(found))
        missing = {column for column in missing if not has_column(column, found)}
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
