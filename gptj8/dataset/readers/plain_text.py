"""Read plain text: which part of a file is a document, and which part is a row.

| `text_row` | a document | a row |
|---|---|---|
| `line` | a line | the document |
| `paragraph` | a file | a paragraph: the lines up to a blank one |
| `file` | a file | the document, or a passage of whole paragraphs of a longer one |

An end-of-text token, such as `<|endoftext|>`, is a border between documents in any case. The rows
of a document follow each other without a border: `Row.next_row` says which row continues a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gptj8.dataset.readers.options import ReadOptions, TextRow
from gptj8.dataset.readers.rows import Row
from gptj8.dataset.readers.text_files import TEXT_SUFFIXES, open_text, suffix_of
from gptj8.runtime.errors import UserError

PASSAGE = 4096
"""Characters after which a passage ends with its paragraph."""

_SHORTEST_PASSAGE = 64
_PASSAGES = 100  # of all text, so that some can be held out
_LONGEST = 8  # times a passage: a longer paragraph is divided at a line's end
_LONGEST_LINE = 1 << 16  # a longer line is divided at white space
_MOST_REPEATED = 0.05  # of the lines, if each is a text of its own

_SAMPLED_FILES = 20
_SAMPLED = 1 << 20
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_LINE_END = re.compile(r"\r\n?\Z|\n\Z")


def choose_text_row(
    files: Iterable[Path], borders: Sequence[str], encoding: str
) -> tuple[TextRow, str]:
    """Return what `text_row: auto` means for files of running text, and why.

    Blank lines and end-of-text tokens show that a line is not a document.
    """
    texts = [file for file in files if suffix_of(file) in TEXT_SUFFIXES]
    for file in texts[:_SAMPLED_FILES]:
        try:
            with open_text(file, encoding) as (text, _):
                sample = text.read(_SAMPLED)
        except (UserError, OSError, EOFError, UnicodeError):
            continue  # reported when the file is read
        for border in borders:
            if border in sample:
                return "file", f"{border} separates documents"
        sample = sample.replace("\r\n", "\n").replace("\r", "\n").strip()
        if _BLANK_LINE.search(sample):
            return "file", "blank lines separate paragraphs, so a file is a document"
        lines = sample.split("\n")
        if len(lines) - len(set(lines)) > _MOST_REPEATED * len(lines):
            return "file", "lines recur, so a file is a document"
    return "line", "there are no blank lines, so a line is a document" if texts else ""


def passage_size(size: int) -> int:
    """Return the characters of a passage, so that text of this size has enough to hold some out."""
    return min(max(size // _PASSAGES, _SHORTEST_PASSAGE), PASSAGE)


def parse_plain(lines: Iterable[str], options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a text.

    Args:
        lines: with their line ends.
        options: `text_row`, `borders` and `passage`; the cells are in the column of `text`.
    """
    column = options.columns["text"]
    parts = _parts(lines, options.borders)
    if options.text_row == "line":
        for number, line, _ in parts:
            if not line.isspace() and line:
                yield Row(number, {column: line.rstrip("\r\n")})
        return
    is_file = options.text_row == "file"
    longest = _LONGEST * (options.passage if is_file else PASSAGE)
    passages = _passages(_divided(parts), options.passage if is_file else 1, longest)
    yield from _linked(passages, column)


def _parts(lines: Iterable[str], borders: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
    """Yield the number and text of each line, and whether a document begins with it.

    A line with a border is divided there.
    """
    pattern = re.compile("|".join(map(re.escape, borders)) or r"(?!)")
    begins = True
    for number, line in enumerate(lines, 1):
        first, *others = pattern.split(line) if any(b in line for b in borders) else (line,)
        if others:
            first = first.rstrip(" ")
        yield number, first, begins
        begins = False
        for part in others:
            yield number, part.lstrip(" "), True


def _divided(
    parts: Iterable[tuple[int, str, bool]],
) -> Iterator[tuple[int, str, bool]]:
    """Divide very long lines at white space."""
    for number, text, begins in parts:
        while len(text) > _LONGEST_LINE:
            end = max(text.rfind(" ", 1, _LONGEST_LINE), text.rfind("\t", 1, _LONGEST_LINE))
            end = end if end > 0 else _LONGEST_LINE
            yield number, text[:end], begins
            text, begins = text[end:], False
        yield number, text, begins


def _passages(
    parts: Iterable[tuple[int, str, bool]], least: int, longest: int
) -> Iterator[tuple[int, str, bool]]:
    """Yield the first line's number and the text of each passage, and whether a document begins.

    A passage ends after the blank lines that follow a paragraph, if it has `least` characters, or
    after a line, if it has `longest`.
    """
    found: list[str] = []
    number = length = 0
    is_first = True
    is_blank = False
    for line, text, begins in parts:
        text = _LINE_END.sub("\n", text)
        is_full = (is_blank and length >= least) or length >= longest
        if found and (begins or (is_full and text.strip())):
            yield number, "".join(found), is_first
            found, length = [], 0
            is_first = begins
        is_first = is_first or begins
        is_blank = not text.strip()
        if not found and is_blank:
            continue  # blank lines before a document
        if not found:
            number = line
        found.append(text)
        length += len(text)
    if found:
        yield number, "".join(found), is_first


def _linked(passages: Iterable[tuple[int, str, bool]], column: str) -> Iterator[Row]:
    """Yield rows that name the row which continues them."""
    waiting: Row | None = None
    for number, text, begins in passages:
        if waiting is not None:
            yield waiting if begins else replace(waiting, next_row=number)
        waiting = Row(number, {column: text}, continues=not begins)
    if waiting is not None:
        yield waiting
