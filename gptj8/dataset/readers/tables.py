"""Find out how a text file with columns is written: delimiter, quotes and names of the columns.

What the params leave to `auto` is decided from the file, and `TableFormat.notes` says what was
decided against the usual.
"""

from __future__ import annotations

import csv
import functools
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.text_files import open_text, suffix_of
from gptj8.runtime.messages import quote

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""The usual delimiter of a suffix."""

FASTTEXT_LABEL = "__label__"
MAX_CELL = 1 << 26

_CANDIDATES = ("\t", ";", "|", ",")  # commas and semicolons are also in texts
_HEAD_LINES = 1000
_HEAD_CHARACTERS = 1 << 18
_LONGEST_LABEL = 40
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?')
_DAMAGED = 10  # records that show quotes, for each that speaks against them
_FEW_QUOTED = 5  # records from which a column in quotes is evidence
_NAMES = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "|"}


@dataclass(frozen=True)
class TableFormat:
    """How a table is written.

    Attributes:
        delimiter: what separates cells; empty for fastText's lines.
        is_quoted: whether quotes around a cell are not part of it.
        names: the names of the columns; None if the file is empty.
        has_header: whether the first line has the names.
        notes: what was decided against the usual, as phrases that follow the file's name.
        skips_space: whether a space after the delimiter is not part of a cell.
        skipped: lines before the table, such as Excel's `sep=;`.
    """

    delimiter: str
    is_quoted: bool
    names: tuple[str, ...] | None
    has_header: bool
    notes: tuple[str, ...] = ()
    skips_space: bool = False
    skipped: int = 0

    def records(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of each record's last line, and its cells; blank lines have no cells.

        Raises:
            csv.Error: if quotes make the rest unreadable.
        """
        lines = itertools.islice(lines, self.skipped, None)
        if self.is_quoted:
            csv.field_size_limit(MAX_CELL)
            reader = csv.reader(
                lines,
                delimiter=self.delimiter,
                strict=True,
                skipinitialspace=self.skips_space,
            )
            yield from ((reader.line_num + self.skipped, cells) for cells in reader)
            return
        # Python's reader refuses a carriage return inside a cell also where nothing is quoted.
        for number, line in enumerate(lines, 1 + self.skipped):
            content = line.removesuffix("\n").removesuffix("\r")
            yield number, content.split(self.delimiter) if content else []


def table_format(path: Path, options: ReadOptions) -> TableFormat:
    """Return the format of a table, which the params give or the file shows.

    Raises:
        UserError: if the file cannot be decoded.
    """
    status = path.stat()
    return _table_format(
        path,
        (status.st_size, status.st_mtime_ns),
        tuple(options.required.items()),
        options.delimiter,
        options.quoting,
        options.encoding,
        options.column_names,
        options.fallback,
    )


@functools.lru_cache(maxsize=4096)
def _table_format(
    path: Path,
    version: tuple[int, int],
    required: tuple[tuple[str, str], ...],
    delimiter: str,
    quoting: str,
    encoding: str,
    names: tuple[str, ...] | None,
    fallback: tuple[str, tuple[str, ...]] | None,
) -> TableFormat:
    del version  # a changed file is read again
    wanted = dict(required)
    head = _head(path, encoding)
    usual = DELIMITERS.get(suffix_of(path))
    skipped = 0
    if head and (separator := _SEPARATOR_LINE.fullmatch(head[0].strip())):  # from Excel
        skipped, head = 1, head[1:]
        delimiter = separator[1] if delimiter == "auto" else delimiter
    if not head:
        return TableFormat(usual or ",", True, None, True)
    if {"text", "label"} == set(wanted) and _is_fasttext(head):
        columns = (wanted["label"], wanted["text"])
        return TableFormat("", False, columns, False, ("has fastText's lines (__label__NAME)",))
    candidates = (delimiter,) if delimiter != "auto" else _candidates(usual)
    found = _with_names(head, candidates, names) if names else None
    found = (
        found or _with_header(head, candidates, wanted) or _without_header(head, candidates, wanted)
    )
    if found is None and fallback is not None:
        found = TableFormat(fallback[0], True, fallback[1], False)
    if found is None:  # the missing columns are reported by who asked for them
        found = TableFormat(candidates[0], True, _first_record(head, candidates[0]), True)
    notes = list(found.notes)
    if delimiter == "auto" and found.delimiter != usual:
        notes.insert(0, f"has cells that are separated by {_NAMES[found.delimiter]}")
    is_quoted = quoting == "minimal"
    if quoting == "auto":
        if found.delimiter == "," and usual == ",":
            is_quoted = True
        else:
            has_quotes, is_quoted = _find_quoting(path, encoding, found.delimiter, skipped)
            if has_quotes:
                what = "around cells, which were removed" if is_quoted else "that are part of it"
                notes.append(f"has quotes {what} (data.quoting)")
    skips_space = is_quoted and found.delimiter != "\t" and _has_spaces(head, found.delimiter)
    if skips_space:
        notes.append("has spaces before quoted cells, which were removed")
    header = found.names
    if found.has_header and not is_quoted:
        header = tuple(map(_unquoted, _split(head[:1], found.delimiter)[0]))
    elif found.has_header and skips_space:
        header = tuple(_unquoted(name.strip()) for name in header or ())
    return TableFormat(
        found.delimiter, is_quoted, header, found.has_header, tuple(notes), skips_space, skipped
    )


def _unquoted(name: str) -> str:
    """Return a column's name without quotes around it."""
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] == '"' else name


def _has_spaces(head: Sequence[str], delimiter: str) -> bool:
    """Return whether cells in quotes have a space before the quote, as some people write CSV."""
    records = _records(head, delimiter)
    spaced = [any(c.startswith(' "') and c.endswith('"') for c in cells) for cells in records]
    return 2 * sum(spaced) > len(records)


def _candidates(usual: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (usual, *_CANDIDATES))))


def _head(path: Path, encoding: str) -> list[str]:
    """Return the first lines that are not blank, as far as they are complete."""
    lines: list[str] = []
    size = 0
    with open_text(path, encoding) as (text, _):
        while len(lines) < _HEAD_LINES and size < _HEAD_CHARACTERS:
            line = text.readline(MAX_CELL)
            if not line:
                break
            size += len(line)
            if not line.isspace():
                lines.append(line)
    return lines


def _is_fasttext(head: Sequence[str]) -> bool:
    return all(line.startswith(FASTTEXT_LABEL) for line in head)


def _records(head: Sequence[str], delimiter: str) -> list[list[str]]:
    """Return the records of the head, of which quotes may have damaged some."""
    try:
        found = list(itertools.islice(csv.reader(head, delimiter=delimiter), _HEAD_LINES))
    except csv.Error:
        return _split(head, delimiter)
    return [record for record in found if record]


def _split(head: Sequence[str], delimiter: str) -> list[list[str]]:
    """Return the cells of each line, of which quotes are part."""
    return [line.rstrip("\r\n").split(delimiter) for line in head]


def _first_record(head: Sequence[str], delimiter: str) -> tuple[str, ...]:
    return tuple(next(iter(_records(head, delimiter)), ()))


def _with_header(
    head: Sequence[str], candidates: Sequence[str], wanted: dict[str, str]
) -> TableFormat | None:
    """Return the first format whose first line names all columns that are wanted."""
    for delimiter in candidates:
        names = _first_record(head, delimiter)
        if set(names).issuperset(wanted.values()):
            return TableFormat(delimiter, True, names, True)
    return None


def _with_names(
    head: Sequence[str], candidates: Sequence[str], names: tuple[str, ...]
) -> TableFormat:
    """Return the first format that gives most lines a cell for each name."""

    def fitting(delimiter: str) -> int:
        return sum(len(record) == len(names) for record in _records(head, delimiter))

    best = max(candidates, key=lambda delimiter: (fitting(delimiter), delimiter == candidates[0]))
    first = tuple(name.strip() for name in _first_record(head, best))
    return TableFormat(best, True, names, first == names)


def _without_header(
    head: Sequence[str], candidates: Sequence[str], wanted: dict[str, str]
) -> TableFormat | None:
    """Return the format of a classification's table whose first line is a row.

    The first line is a row if it has a label that later lines repeat. Labels are short and few;
    the text is the longest column.
    """
    if set(wanted) != {"text", "label"}:
        return None
    ways = [(d, read(head, d)) for d in candidates for read in (_records, _split)]
    for delimiter, records in ways:
        width = Counter(map(len, records)).most_common(1)[0][0] if records else 0
        if width < 2 or not records or len(records[0]) != width:
            continue
        columns = list(zip(*(r for r in records if len(r) == width), strict=True))
        label = _label_column(columns)
        if label is None:
            continue
        others = [number for number in range(width) if number != label]
        text = max(others, key=lambda number: statistics.fmean(map(len, columns[number])))
        names = [f"column {number}" for number in range(1, width + 1)]
        names[text], names[label] = wanted["text"], wanted["label"]
        note = (
            f"has no header line; its column {text + 1} was read as {quote(wanted['text'])} and "
            f"column {label + 1} as {quote(wanted['label'])} (data.column_names)"
        )
        return TableFormat(delimiter, True, tuple(names), False, (note,))
    return None


def _label_column(columns: Sequence[Sequence[str]]) -> int | None:
    """Return the column with the fewest values, all of them short; None if there is not one."""
    found: dict[int, int] = {}
    for number, cells in enumerate(columns):
        counts = Counter(cell.strip() for cell in cells)
        is_label = "" not in counts and max(map(len, counts)) <= _LONGEST_LABEL
        is_label = is_label and not any(mark in cell for cell in counts for mark in "\t;|")
        few = 2 <= len(counts) <= max(3, len(cells) // 5)
        if is_label and few and counts[cells[0].strip()] > 1:
            found[number] = len(counts)
    fewest = [number for number, count in found.items() if count == min(found.values())]
    return fewest[0] if len(fewest) == 1 else None


def _find_quoting(path: Path, encoding: str, delimiter: str, skipped: int) -> tuple[bool, bool]:
    """Return whether cells begin with quotes, and whether these are not part of the text.

    It speaks for quotes around cells that the header is quoted as a whole, that each cell of a
    column is, or that a cell needs its quotes: it contains the delimiter, a line break or doubled
    quotes. It speaks against them that a record cannot be read with them, that a cell without
    quotes around it contains one, or that removing them joins lines that are complete rows. One
    damaged record does not outweigh many others.
    """
    with open_text(path, encoding) as (text, _):
        pieces: list[str] = []

        def lines() -> Iterator[str]:
            for line in text:
                pieces.append(line)
                yield line

        csv.field_size_limit(MAX_CELL)
        source = itertools.islice(lines(), skipped, None)
        pro = contra = rows = width = 0
        has_quotes = False
        quoted_cells: Counter[int] = Counter()
        while True:
            try:
                for cells in csv.reader(source, delimiter=delimiter, strict=True):
                    record = "".join(pieces).rstrip("\r\n")
                    pieces.clear()
                    rows += bool(width)
                    if '"' in record:
                        raw = record.split(delimiter)
                        starts = [place for place, cell in enumerate(raw) if cell[:1] == '"']
                        has_quotes = has_quotes or bool(starts)
                        quoted_cells.update(starts if width else ())
                        spoken = _speaks(cells, raw, "\n" in record, delimiter, width)
                        pro, contra = pro + (spoken > 0), contra + (spoken < 0)
                    width = width or len(cells)
                break
            except csv.Error:
                pieces.clear()
                has_quotes, contra = True, contra + 1
    if rows >= _FEW_QUOTED and not contra:
        pro += max(quoted_cells.values(), default=0) == rows
    return has_quotes, pro > _DAMAGED * contra


def _speaks(
    cells: Sequence[str], raw: Sequence[str], spans: bool, delimiter: str, width: int
) -> int:
    """Return 1 if a record shows that cells are quoted, -1 if that quotes are text, otherwise 0.

    Args:
        cells: the record, read with quotes.
        raw: its cells, read without.
        spans: whether it spans several lines.
        delimiter: the delimiter.
        width: the number of columns; 0 for the header.
    """
    if len(raw) != len(cells) or spans:
        return -1 if joined_rows(cells, delimiter) or (width and len(cells) != width) else 1
    quoted = [cell for cell in raw if '"' in cell]
    if not all(cell.startswith('"') for cell in quoted):
        return -1
    return int(
        any('""' in cell[1:-1] for cell in quoted) or (not width and len(quoted) == len(raw))
    )


def joined_rows(cells: Sequence[str], delimiter: str) -> int:
    """Return the number of rows that a record seems to join; 0 if it looks like one row.

    In a cell with a stray pair of quotes, each inner line has as many separators as a complete row,
    and the first and last lines have those of the row parts after the opening quote and before the
    closing quote. Text with one comma per line looks the same, so CSV with two columns needs at
    least four lines.
    """
    others = len(cells) - 1
    least = 2 if delimiter == "\t" else 4 if others == 1 else 3
    for column, cell in enumerate(cells):
        counts = [part.count(delimiter) for part in cell.split("\n")]
        rows = [others - column, *[others] * (len(counts) - 2), column]
        if others and len(counts) >= least and counts == rows:
            return len(counts)
    return 0
