"""Prompt templates, which define how a row becomes a prompt.

A template is literal text with fields in braces. `"{text}\\n\\nLabel:"` is a plain template, and
`"### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n"` an instruction
template.

The text from the first to the last field is the row's text. Only this part is truncated if a prompt
is too long. The text before and after it is the same in every prompt and never truncated, so the
prompt always ends with the words that ask for the answer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

MESSAGES = "messages"
"""The field for a conversation."""

_RESERVED = ("file", "row", "split", "problem", "warning", "label", "completion")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        before, after: the literal text before the first and after the last field.
        parts: pairs (literal, field) in order. A literal precedes its field; the first is empty.
    """

    before: str
    parts: tuple[tuple[str, str], ...]
    after: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The distinct fields, in order."""
        return tuple(dict.fromkeys(field for _, field in self.parts))

    def outer(self, field: str) -> str:
        """Return this template with the row's text replaced by a single field named `field`."""
        return f"{_escape(self.before)}{{{field}}}{_escape(self.after)}"

    def text(self, cells: Mapping[str, str | None]) -> str:
        """Return a row's text. A missing or blank cell is omitted together with its literal."""
        pieces: list[str] = []
        for literal, field in self.parts:
            cell = cells[field]
            if cell is not None and (cell := cell.strip()):
                pieces += [literal, cell] if pieces else [cell]
        return "".join(pieces)


def split_at_fields(template: str) -> tuple[list[str], list[str]]:
    """Split a template into literal text and field names.

    Returns:
        The literals, with doubled braces unescaped, and the names of the fields between them. There
        is one literal more than there are names.

    Raises:
        ValueError: if the template is invalid.
    """
    literals: list[str] = [""]
    fields: list[str] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            literals[-1] += literal
            if name is None:
                continue
            if not name or spec or conversion:
                raise ValueError(f"a field is a column's name in braces, not {{{name}{spec}}}")
            fields.append(name)
            literals.append("")
    except ValueError as error:
        raise ValueError(f"prompt_template is not a valid template: {error}") from None
    return literals, fields


def parse_template(template: str, task: str) -> Template:
    """Parse a template and check its fields against the task.

    Raises:
        ValueError: if the template is invalid or has no field that the task can use.
    """
    literals, fields = split_at_fields(template)
    if not fields:
        usual = "prompt" if task == "completion" else "text"
        raise ValueError(f"prompt_template must contain a field, such as {{{usual}}}")
    for name in fields:
        if name in _RESERVED or name.endswith("_kind"):
            raise ValueError(
                f"prompt_template cannot contain {{{name}}}, a reserved name; rename the column"
            )
    if MESSAGES in fields and (task != "completion" or len(fields) > 1):
        raise ValueError(
            "prompt_template with {messages} cannot contain other fields and needs task=completion"
        )
    wrong = {"completion": "text", "classification": "prompt"}.get(task)
    if wrong in fields:
        usual = "prompt" if task == "completion" else "text"
        raise ValueError(
            f"prompt_template must contain {{{usual}}} and not {{{wrong}}} for task={task}"
        )
    parts = zip(["", *literals[1:-1]], fields, strict=True)
    return Template(literals[0], tuple(parts), literals[-1])


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
