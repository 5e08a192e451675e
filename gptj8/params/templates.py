"""Prompt templates: what of a row stands where in its prompt.

A template is literal text with fields in braces. `"{text}\\n\\nLabel:"` is the raw style,
`"### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n"` an instruction
style.

What lies between the first and the last field, both included, is the row's own text: the only part
that is cut where a prompt is too long. What lies before and after it is the same in every prompt
and never cut, so the words that ask for the answer are always there.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

MESSAGES = "messages"
"""The field that stands for a conversation."""

_RESERVED = ("file", "row", "split", "problem", "warning", "label", "completion")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        before, after: the literal text around all fields.
        parts: (literal, field) in order; the literal stands before its field, the first is empty.
    """

    before: str
    parts: tuple[tuple[str, str], ...]
    after: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields, each once, in order."""
        return tuple(dict.fromkeys(field for _, field in self.parts))

    def outer(self, field: str) -> str:
        """Return this template with one field, named `field`, for the row's whole text."""
        return f"{_escape(self.before)}{{{field}}}{_escape(self.after)}"

    def text(self, cells: Mapping[str, str | None]) -> str:
        """Return a row's own text; a part whose cell is missing or blank is left out whole."""
        pieces: list[str] = []
        for literal, field in self.parts:
            cell = cells[field]
            if cell is not None and (cell := cell.strip()):
                pieces += [literal, cell] if pieces else [cell]
        return "".join(pieces)


def split_at_fields(template: str) -> tuple[list[str], list[str]]:
    """Split a template into literal text and the names of its fields.

    Returns:
        the literals, in which doubled braces are single, and the names in braces between them: one
        literal more than names.

    Raises:
        ValueError: if it is not a template.
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
        raise ValueError(f"prompt_template is not a template: {error}") from None
    return literals, fields


def parse_template(template: str, task: str) -> Template:
    """Split a template at its fields.

    Raises:
        ValueError: if it is not a template or has no field that the task can use.
    """
    literals, fields = split_at_fields(template)
    if not fields:
        usual = "prompt" if task == "completion" else "text"
        raise ValueError(f"prompt_template must hold a field, such as {{{usual}}}")
    for name in fields:
        if name in _RESERVED or name.endswith("_kind"):
            raise ValueError(
                f"prompt_template cannot hold {{{name}}}; a column of that name needs another one"
            )
    if MESSAGES in fields and (task != "completion" or len(fields) > 1):
        raise ValueError(
            "prompt_template with {messages} holds no other field, and its task is completion"
        )
    wrong = {"completion": "text", "classification": "prompt"}.get(task)
    if wrong in fields:
        usual = "prompt" if task == "completion" else "text"
        raise ValueError(
            f"prompt_template must hold {{{usual}}} and not {{{wrong}}} for task={task}"
        )
    parts = zip(["", *literals[1:-1]], fields, strict=True)
    return Template(literals[0], tuple(parts), literals[-1])


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
