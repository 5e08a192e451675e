"""How files are read: the params of `data` that concern files, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptj8.dataset.readers.row_shapes import Shape
from gptj8.params.sections import Data

END_OF_TEXT = "<|endoftext|>"
"""The border between documents in text files, whichever end-of-text token the model has."""

TextRow = Literal["line", "paragraph", "file"]


def borders_of(eos: str) -> tuple[str, ...]:
    """Return what separates documents in plain text for a model with this end-of-text token."""
    return tuple(dict.fromkeys(filter(None, (END_OF_TEXT, eos))))


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a file, and how.

    Attributes:
        columns: the name of the column for each requested field.
        optional: fields whose column may be missing.
        text_row: what one row of plain text is; see `gptj8.dataset.readers.plain_text`.
        borders: texts that separate documents in plain text.
        passage: characters of a passage; see `gptj8.dataset.readers.plain_text.passage_size`.
        delimiter, quoting, encoding: as in params.yaml; `auto` finds them.
        column_names: the names of the columns of tables without a header; None finds out whether
            the first line has them.
        fallback: the delimiter and the names of tables that do not show theirs; those of the first
            training file, if it has no header.
        list_fields: fields of a template whose cells are lists; their items are put on lines.
        folder_labels: whether each plain text file is a row whose label is the name of its folder.
    """

    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    text_row: TextRow = "line"
    borders: tuple[str, ...] = (END_OF_TEXT,)
    passage: int = 64
    delimiter: str = "auto"
    quoting: str = "auto"
    encoding: str = "auto"
    column_names: tuple[str, ...] | None = None
    fallback: tuple[str, tuple[str, ...]] | None = None
    list_fields: frozenset[str] = frozenset()
    folder_labels: bool = False

    @property
    def required(self) -> dict[str, str]:
        """The columns that every file must have, by field."""
        return {f: c for f, c in self.columns.items() if f not in self.optional}

    @property
    def is_text(self) -> bool:
        """Whether plain text files hold running text, and not a table."""
        return list(self.columns) == ["text"]


def read_options(
    data: Data,
    shape: Shape,
    text_row: TextRow,
    borders: tuple[str, ...],
    passage: int,
    folder_labels: bool,
) -> ReadOptions:
    """Return the options that the params give.

    Args:
        data: the params.
        shape: the shape of the rows.
        text_row: `data.text_row`, or what was found for `auto`.
        borders: from `borders_of`.
        passage: characters of a passage.
        folder_labels: see `ReadOptions`.
    """
    names = data.column_names
    return ReadOptions(
        shape.columns,
        shape.optional,
        text_row,
        borders,
        passage,
        data.delimiter,
        data.quoting,
        data.encoding,
        None if names == "auto" else names,
        folder_labels=folder_labels,
    )
