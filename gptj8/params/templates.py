"""Prompt templates, which define how a row becomes a prompt.

A template is literal text with fields in braces. `"{text}\\n\\nLabel:"` is a plain template, and
`"### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n"` an instruction
template.

The text from the first to the last field is the row's text. Only this part is truncated if a prompt
is too long. The text before and after it is the same in every prompt and never truncated, so the
prompt always ends with the words that ask for the answer.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

MESSAGES = "messages"
"""The field for a conversation."""

_SEPARATORS = " \t\n,;|/"
_RESERVED = ("file", "row", "split", "problem", "warning", "label", "completion")


@dataclass(frozen=True)
class Field:
    """A field with the words that belong to it.

    Attributes:
        name: the column's name in the template.
        gap: what separates it from the field before; omitted with it.
        label: the words that lead to it, such as `Input: ` or a heading on the line above.
        closing: what follows on the same line, such as a bracket.
    """

    name: str
    gap: str = ""
    label: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        before, after: the literal text that every prompt begins and ends with.
        parts: the fields in order.
    """

    before: str
    parts: tuple[Field, ...]
    after: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The distinct fields, in order."""
        return tuple(dict.fromkeys(part.name for part in self.parts))

    def outer(self, field: str) -> str:
        """Return this template with the row's text replaced by a single field named `field`."""
        return f"{_escape(self.before)}{{{field}}}{_escape(self.after)}"

    def with_optional(self, optional: Collection[str]) -> Template:
        """Return the template for rows in which the cells of these fields may be empty.

        The label of the first field and what closes the last one become parts of the row's text if
        they can be omitted.
        """
        parts = list(self.parts)
        before, after = self.before, self.after
        if parts[0].name in optional:
            before, label = _split_label(before)
            parts[0] = replace(parts[0], label=label)
        if parts[-1].name in optional:
            closing, after = _split_closing(after, parts[-1].label)
            parts[-1] = replace(parts[-1], closing=closing)
        return Template(before, tuple(parts), after)

    def text(self, cells: Mapping[str, str | None]) -> str:
        """Return a row's text. A missing or blank cell is omitted with the words that belong to
        it."""
        pieces: list[str] = []
        for part in self.parts:
            cell = cells[part.name]
            if cell is not None and cell.strip():
                pieces += [part.gap] if pieces else []
                pieces += [part.label, cell, part.closing]
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
    parts = [Field(fields[0])]
    for literal, name in zip(literals[1:-1], fields[1:], strict=True):
        closing, rest = _split_closing(literal, parts[-1].label if parts[1:] else literals[0])
        gap, label = _split_gap(rest)
        parts[-1] = replace(parts[-1], closing=closing)
        parts.append(Field(name, gap, label))
    return Template(literals[0], tuple(parts), literals[-1])


def unescaped(template: str) -> str:
    """Return a template with the characters `\\n` and `\\t` replaced by a line break and a tab.

    Shells and single-quoted YAML pass them on as they are. A doubled backslash stands for one.
    """
    known = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: known[found.group()], template)


def _split_closing(literal: str, label: str) -> tuple[str, str]:
    """Split the literal after a field into what closes it and the rest.

    That is the rest of its line, if the literal has more lines. Otherwise, it is a bracket or a
    quote that the field's label opens.
    """
    line, found, _ = literal.partition("\n")
    if found:
        return line, literal[len(line) :]
    opened = label.rstrip()[-1:]
    closes = {"(": ")", "[": "]", "{": "}", "<": ">", "\u201c": "\u201d", "\u00ab": "\u00bb"}
    mark = closes.get(opened, opened if opened in ('"', "'", "`", "*", "|") else "")
    size = len(mark) if mark and literal.startswith(mark) else 0
    return literal[:size], literal[size:]


def _split_gap(literal: str) -> tuple[str, str]:
    """Split the literal before a field into the separator and the field's label."""
    label = literal.lstrip(_SEPARATORS)
    return literal[: len(literal) - len(label)], label


def _split_label(before: str) -> tuple[str, str]:
    """Split the literal before the first field into the introduction and the field's label.

    The label is the last line, with the line above if it is a heading on a line of its own.
    """
    if before.endswith("\n\n"):
        return before, ""
    start = before.removesuffix("\n").rfind("\n") + 1
    return before[:start], before[start:]


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
