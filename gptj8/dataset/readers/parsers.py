"""Parse files into rows, each a mapping from column to cell; one parser per format.

All formats are streamed, except a JSON array or object, which is read into memory. A malformed row
has a `problem`; an error is raised only when the rest of the file cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gptj8.dataset.readers.columnar import BATCH_ROWS, COLUMNAR, parse_columnar
from gptj8.dataset.readers.delimited import parse_table
from gptj8.dataset.readers.folders import label_of_folder
from gptj8.dataset.readers.json_rows import parse_json
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.plain_text import parse_plain
from gptj8.dataset.readers.rows import EmptyFileError, Row
from gptj8.dataset.readers.tables import DELIMITERS
from gptj8.dataset.readers.text_files import (
    TEXT_SUFFIXES,
    open_binary,
    open_text,
    reading,
    suffix_of,
)

SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson", ".json", *COLUMNAR, ".txt")

_JSON = (".jsonl", ".ndjson", ".json")


def is_plain(path: Path, options: ReadOptions) -> bool:
    """Return whether a file is text without columns."""
    return (options.is_text or options.folder_labels) and suffix_of(path) in TEXT_SUFFIXES


def is_table(path: Path, options: ReadOptions) -> bool:
    """Return whether a file is a table in a text file."""
    return suffix_of(path) not in (*_JSON, *COLUMNAR) and not is_plain(path, options)


def parse_file(
    path: Path, options: ReadOptions, advance: Callable[[int], object] = lambda size: None
) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: the file.
        options: what to read.
        advance: called with the bytes of the file that were read since the last call.

    Raises:
        UserError: if the file is empty, cannot be decoded or does not follow its format.
    """
    empty = True
    is_columnar = suffix_of(path) in COLUMNAR
    parse = parse_columnar if is_columnar else _parse_text
    with reading(path, options.encoding, "read" if is_columnar else "decompressed"):
        for row in parse(path, options, advance):
            empty = False
            yield row
    if empty:
        nothing = not is_columnar and _has_no_bytes(path)
        raise EmptyFileError(f"{path} is empty" if nothing else f"{path} has no rows")


def _parse_text(
    path: Path, options: ReadOptions, advance: Callable[[int], object]
) -> Iterator[Row]:
    is_json = suffix_of(path) in _JSON
    # In JSON, a carriage return is never part of a text.
    with open_text(path, options.encoding, "" if is_json else None) as (text, raw):
        if is_json:
            rows = parse_json(text, path, options)
        elif is_table(path, options):
            rows = parse_table(text, path, options)
        elif options.folder_labels:
            rows = _labelled(text.read(), path, options)
        else:
            rows = parse_plain(text, options)
        position = 0
        for index, row in enumerate(rows, 1):
            yield row
            if index % BATCH_ROWS == 0:
                advance(raw.tell() - position)
                position = raw.tell()
        advance(raw.tell() - position)


def _labelled(content: str, path: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield a file as one row, with the name of its folder as the label."""
    text = content.replace("\r\n", "\n")
    if text.strip():
        columns = options.columns
        yield Row(1, {columns["text"]: text, columns["label"]: label_of_folder(path) or ""})


def _has_no_bytes(path: Path) -> bool:
    with open_binary(path) as (stream, _):
        return not stream.read(1)
