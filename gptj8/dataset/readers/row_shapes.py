"""Convert the user's columns to the fields of a task.

| columns | params | fields |
|---|---|---|
| a text | task: text | text |
| one or more columns and a label | task: classification, a template with them | text, label |
| a prompt and a completion | task: completion | prompt, completion |
| instruction, input, output | the same, a template with {instruction} and {input} | the same |
| chat messages | the same, a template with {messages} | the same |

A conversation stays a list of messages until it is encoded
(`gptj8.dataset.prepared.conversations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from gptj8.dataset.prepared.conversations import Conversation, read_conversation
from gptj8.dataset.prepared.dataset import FIELDS
from gptj8.dataset.readers.rows import cell_of, on_lines, text_and_kind
from gptj8.dataset.text import INVISIBLE
from gptj8.params.sections import Data
from gptj8.params.templates import MESSAGES, Template, parse_template

WHOLE_FIELDS = ("text", "prompt", MESSAGES)
"""Fields whose cells are not made of the items of lists."""
_BESIDE_MESSAGES = ("tools", "system")
"""Fields that a conversation may have; files need not have their columns."""
_ANY_KINDS = ("text", "integer", "number", "boolean")
_KINDS = {
    "text": ("text",),
    "prompt": ("text",),
    MESSAGES: ("list", "text"),  # in CSV, lists are written as JSON
    "tools": ("list", "text"),
    "system": ("text",),
}


def kinds_of(field: str) -> tuple[str, ...]:
    """Return the kinds of cells that a field may have (`gptj8.dataset.readers.rows.text_and_kind`).

    The text or prompt must be a string. An answer may be a number (label 0, completion 42), and so
    may other columns of a template.
    """
    return _KINDS.get(field, _ANY_KINDS)


def with_article(kind: str) -> str:
    """Return the kind of a cell with its article: `an integer`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


@dataclass(frozen=True)
class Shape:
    """The columns of a row and the task that they are converted to.

    Attributes:
        task: `classification`, `completion` or `text`.
        columns: the user's column for each field of the row.
        optional: fields whose cell may be missing or blank.
        template: the prompt template; null for running text.
    """

    task: str
    columns: Mapping[str, str]
    optional: frozenset[str]
    template: Template | None

    @property
    def input(self) -> str:
        """The input field: `text` or `prompt`."""
        return FIELDS[self.task][0]

    @property
    def answer(self) -> str | None:
        """The answer field: `label`, `completion` or None."""
        return FIELDS[self.task][1] if len(FIELDS[self.task]) > 1 else None

    @property
    def is_conversation(self) -> bool:
        """Whether the rows are messages."""
        return MESSAGES in self.columns

    @property
    def expected(self) -> list[str]:
        """The optional columns that at least one file must have, because a template names them."""
        return [self.columns[f] for f in self.optional if f not in _BESIDE_MESSAGES]

    @property
    def prompt_template(self) -> str:
        """The prompt template with the task's input as its only field."""
        return self.template.outer(self.input) if self.template else f"{{{self.input}}}"

    def column_of(self, field: str) -> str:
        """Return the user's column or columns for a task field, for use in messages."""
        if field in self.columns:
            return self.columns[field]
        parts = [self.columns[MESSAGES]] if self.is_conversation else []
        parts += [c for f, c in self.columns.items() if f != self.answer and not parts]
        return ", ".join(parts)

    def to_fields(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the task's fields of valid rows; labels are stripped of white space.

        The rows have prompts and answers, and not messages; see `conversation_of`.
        """
        if self.template is None or self.template.fields == (self.input,):
            texts = rows[self.input]
        else:
            cells = rows[list(self.template.fields)].astype(object)
            cells = cells.where(cells.notna(), None)
            texts = [self.template.text(row) for row in cells.to_dict("records")]
        found = pd.DataFrame({self.input: pd.array(list(texts), dtype="str")}, index=rows.index)
        if self.answer is not None:
            is_label = self.answer == "label"
            found[self.answer] = rows[self.answer].str.strip() if is_label else rows[self.answer]
        return found

    def text_of(self, cells: Mapping[str, Any]) -> str:
        """Return the input text of one row without an answer; see `conversation_of` for messages.

        Cells that are not text, such as numbers, become the text that they have in training.

        Args:
            cells: cells by the user's column names; extra cells are ignored. A nested column may
                be inside an object, or have its own name.

        Raises:
            ValueError: with the column that is missing, empty or of the wrong kind.
        """
        fields: dict[str, str | None] = {}
        for name, column in self.columns.items():
            if name == self.answer:
                continue
            cell = cell_of(cells, column)
            is_list = isinstance(cell, list) and name not in WHOLE_FIELDS
            if is_list and (lines := on_lines(cell)) is not None:
                cell = lines  # as `gptj8.dataset.readers.formats` reads it
            text, kind = (cell, "text") if isinstance(cell, str) else text_and_kind(cell)
            if kind not in (*kinds_of(name), "missing"):
                raise ValueError(f"{column} is {with_article(kind)}, not text")
            if not (text or "").strip(INVISIBLE) and name not in self.optional:
                raise ValueError(f"{column} is {'empty' if column in cells else 'missing'}")
            fields[name] = text
        if self.template is None or self.template.fields == (self.input,):
            return fields[self.input] or ""
        return self.template.text(fields)

    def conversation_of(self, cells: Mapping[str, Any]) -> Conversation:
        """Return the messages of one row, to be answered.

        Args:
            cells: cells by the user's column names; lists may be JSON.

        Raises:
            ValueError: with the column and what is wrong with it.
        """
        columns = self.columns
        messages, tools, system = (cells.get(columns[n]) for n in (MESSAGES, *_BESIDE_MESSAGES))
        try:
            conversation = read_conversation(messages, tools, system)
            if not conversation.messages:
                raise ValueError("has no messages")
        except ValueError as error:
            raise ValueError(f"{columns[MESSAGES]} {error}") from None
        return conversation


def shape_of(data: Data) -> Shape:
    """Return the row shape for the params."""
    if data.task == "text":
        return Shape("text", {"text": data.text_column}, frozenset(), None)
    template = parse_template(data.prompt_template, data.task)
    named = {
        "text": data.text_column,
        "prompt": data.prompt_column,
        MESSAGES: data.messages_column,
    }
    columns = {field: named.get(field, field) for field in template.fields}
    optional = frozenset(f for f, column in columns.items() if column in data.optional_columns)
    if len(columns) == 1:  # the only column of a prompt must not be empty
        optional = frozenset()
    template = template.with_optional(optional)
    if MESSAGES in columns:
        columns |= {"tools": data.tools_column, "system": data.system_column}
        optional = frozenset(_BESIDE_MESSAGES)
    else:
        answer = FIELDS[data.task][1]
        columns[answer] = getattr(data, f"{answer}_column")
    return Shape(data.task, columns, optional, template)
