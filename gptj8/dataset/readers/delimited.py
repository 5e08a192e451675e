"""Read the rows of tables in text files: CSV, TSV and their relatives, and fastText's lines."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from gptj8.dataset.readers.csv_quotes import find_quote_problem
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.rows import Row, check_names
from gptj8.dataset.readers.tables import (
    FASTTEXT_LABEL,
    MAX_CELL,
    TableFormat,
    joined_rows,
    table_format,
)
from gptj8.dataset.readers.text_files import open_text
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted


def parse_table(text: io.TextIOWrapper, path: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a table; a record with the wrong number of cells has a `problem`.

    Raises:
        UserError: with line and column if a quote makes the rest unreadable.
    """
    found = table_format(path, options)
    if not found.delimiter:
        yield from _parse_fasttext(text, options)
        return
    header = None if found.has_header or found.names is None else list(found.names)
    number = line = 0
    try:
        for last_line, cells in found.records(text):
            line, start = last_line, line + 1
            # Skip blank lines. In a file with one column, an empty quoted cell is a row.
            if not cells or (len(cells) == 1 and not cells[0].strip() and len(header or ()) != 1):
                continue
            if header is None:
                header = list(found.names or cells)
                check_names(header, path, options.columns.values())
                continue
            number += 1
            if len(cells) == len(header):
                warning = None
                if line > start and (rows := joined_rows(cells, found.delimiter)):
                    warning = f"may be {rows} rows joined by a stray quote on line {start}"
                yield Row(number, dict(zip(header, cells, strict=True)), warning=warning)
                continue
            yield Row(number, {}, _wrong_count(cells, start, header, found))
    except csv.Error as error:
        raise UserError(_explain(path, options, found, line, error)) from None


def _wrong_count(cells: list[str], line: int, header: list[str], found: TableFormat) -> str:
    names = "the header has" if found.has_header else "there are names for"
    problem = f"has {counted(len(cells), 'cell')} on line {line}, but {names} {len(header)}"
    if len(cells) > len(header) and found.is_quoted:
        problem += "; quote cells that contain the separator"
    return problem


def _explain(
    path: Path, options: ReadOptions, found: TableFormat, line: int, error: csv.Error
) -> str:
    """Return where a record cannot be read, and why."""
    if "new-line character" in str(error):
        return (
            f"{path} line {line + 1}: a cell contains a carriage return; put the cell in quotes, "
            "or remove it"
        )
    with open_text(path, options.encoding) as (text, _):
        rest = itertools.islice(text, line, None)
        first = next(rest, "")
        lines = itertools.chain([first], rest)
        place = find_quote_problem(lines, found.delimiter, MAX_CELL)
    if place is None:
        return f"{path} line {line + 1}: {error}"
    advice = ""
    if '\\"' in first:
        advice = ", and not with a backslash before it"
    elif options.quoting == "auto":
        advice = "; if quotes are part of the text, set data.quoting: none"
    where = f"line {line + place.line} column {place.column}"
    return f"{path} {where}: {place.reason}{advice}"


def _parse_fasttext(text: io.TextIOWrapper, options: ReadOptions) -> Iterator[Row]:
    """Yield rows of lines such as `__label__spam Win a prize`."""
    for number, line in enumerate(text, 1):
        if line.isspace():
            continue
        words = line.strip().split(" ")
        labels = list(itertools.takewhile(lambda word: word.startswith(FASTTEXT_LABEL), words))
        if len(labels) != 1:
            found = f"{len(labels)} labels" if labels else "no label"
            yield Row(number, {}, f"has {found} ({FASTTEXT_LABEL}NAME); one is needed")
            continue
        cells = {
            options.columns["label"]: labels[0].removeprefix(FASTTEXT_LABEL),
            options.columns["text"]: " ".join(words[1:]),
        }
        yield Row(number, cells)
