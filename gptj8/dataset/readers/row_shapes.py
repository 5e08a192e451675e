"""Convert the user's columns to the fields of a task.

| columns | params | fields |
|---|---|---|
| a text | task: text | text |
| one or more columns and a label | task: classification, a template with them | text, label |
| a prompt and a completion | task: completion | prompt, completion |
| instruction, input, output | the same, a template with {instruction} and {input} | the same |
| chat messages | the same, a template with {messages} | the same |

The completion of a conversation is its last message, which must be the assistant's. The prompt is
the messages before it, one line `role: content` per message. Two formats are supported: `role` and
`content`, and `from` and `value` with `human` and `gpt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from gptj8.dataset.prepared.dataset import FIELDS
from gptj8.dataset.text import INVISIBLE
from gptj8.params.sections import Data
from gptj8.params.templates import MESSAGES, Template, parse_template

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


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
    def truncation_side(self) -> Literal["left", "right"]:
        """The side where a text that is too long is cut; a conversation keeps its end."""
        return "left" if MESSAGES in self.columns else "right"

    @property
    def prompt_template(self) -> str:
        """The prompt template with the task's input as its only field."""
        return self.template.outer(self.input) if self.template else f"{{{self.input}}}"

    def column_of(self, field: str) -> str:
        """Return the user's column or columns for a task field, for use in messages."""
        if field in self.columns:
            return self.columns[field]
        parts = [c for f, c in self.columns.items() if f not in ("label", "completion")]
        return ", ".join(parts)

    def to_fields(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the task's fields of valid rows; answers are stripped of white space."""
        if MESSAGES in self.columns:
            split = [_split_conversation(cell) for cell in rows[MESSAGES]]
            prompts, completions = zip(*split, strict=True) if split else ((), ())
            fields = {"prompt": prompts, "completion": completions}
            return pd.DataFrame(fields, index=rows.index, dtype="str")
        if self.template is None or self.template.fields == (self.input,):
            texts = rows[self.input]
        else:
            cells = rows[list(self.template.fields)].astype(object)
            cells = cells.where(cells.notna(), None)
            texts = [self.template.text(row) for row in cells.to_dict("records")]
        found = pd.DataFrame({self.input: pd.array(list(texts), dtype="str")}, index=rows.index)
        if self.answer is not None:
            found[self.answer] = rows[self.answer].str.strip()
        return found

    def text_of(self, cells: Mapping[str, Any]) -> str:
        """Return the input text of one row without an answer.

        Args:
            cells: cells by the user's column names; extra cells are ignored. The cell of `messages`
                is a list of messages, or that list as JSON.

        Raises:
            ValueError: with the column that is missing, empty or not a string.
        """
        fields: dict[str, str | None] = {}
        for name, column in self.columns.items():
            if name == self.answer:
                continue
            cell = cells.get(column)
            if name == MESSAGES:
                return _conversation_before_answer(cell, column)
            if cell is not None and not isinstance(cell, str):
                raise ValueError(f"{column} is not a string")
            if not (cell or "").strip(INVISIBLE) and name not in self.optional:
                raise ValueError(f"{column} is {'empty' if column in cells else 'missing'}")
            fields[name] = cell
        if self.template is None or self.template.fields == (self.input,):
            return fields[self.input] or ""
        return self.template.text(fields)


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
    if MESSAGES not in columns:
        answer = FIELDS[data.task][1]
        columns[answer] = getattr(data, f"{answer}_column")
    return Shape(data.task, columns, optional, template)


def conversation_problem(cell: str) -> str | None:
    """Return why a conversation, given as JSON, cannot be used for training, or None."""
    try:
        messages = json.loads(cell)
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list):
        return "is not a list of messages"
    for number, message in enumerate(messages, 1):
        if _role(message) is None:
            return f"message {number} has no valid role ({', '.join(_ROLES)})"
        content = _content(message)
        if not isinstance(content, str):
            return f"message {number} has no text"
        if not content.strip(INVISIBLE):
            return f"message {number} is empty"
    if len(messages) < 2:
        return "has fewer than two messages"
    if _role(messages[-1]) != "assistant":
        return "does not end with the assistant's answer"
    if all(_role(message) != "user" for message in messages):
        return "has no message from the user"
    return None


def conversation_text(cell: str) -> str:
    """Return the contents of a conversation's messages; any other cell is returned unchanged."""
    try:
        messages = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    if not isinstance(messages, list):
        return cell
    contents = (_content(message) for message in messages if isinstance(message, dict))
    return "\n".join(content for content in contents if isinstance(content, str))


def _split_conversation(cell: str) -> tuple[str, str]:
    messages = json.loads(cell)
    return _conversation_prompt(messages[:-1]), _content(messages[-1]).strip()


def _conversation_prompt(messages: Sequence[Any]) -> str:
    return "\n".join(f"{_role(message)}: {_content(message).strip()}" for message in messages)


def _conversation_before_answer(cell: Any, column: str) -> str:
    messages = cell
    if isinstance(cell, str):
        try:
            messages = json.loads(cell)
        except (ValueError, RecursionError):
            messages = None
    answer = {"role": "assistant", "content": "to come"}
    complete = [*messages, answer] if isinstance(messages, list) else messages
    problem = conversation_problem(json.dumps(complete))
    if problem:
        raise ValueError(f"{column} {problem}")
    return _conversation_prompt(complete[:-1])


def _role(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    return _ROLES.get(role.casefold()) if isinstance(role, str) else None


def _content(message: dict[str, Any]) -> Any:
    content = message.get("content")
    return message.get("value") if content is None else content
