"""Define valid rows as pandera schemas: one column schema per field, one frame schema per shape.

The schemas check rows as `gptj8.dataset.readers.formats` reads them: the text of each cell and, in
a second column, its kind. Validation is lazy, so that all failures of all rows are collected.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from html.entities import html5

import ftfy
import pandas as pd
import pandera.pandas as pa
from ftfy.badness import is_bad

from gptj8.dataset.prepared.conversations import read_conversation, texts_of
from gptj8.dataset.readers.row_shapes import Shape, kinds_of, with_article
from gptj8.dataset.text import INVISIBLE
from gptj8.params.templates import MESSAGES

_ENTITY = r"&(?:[a-zA-Z][a-zA-Z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});"
_CONTROL = r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"

_PLACEHOLDER = r"<\|?(?:image|audio|video)(?:_\d+)?\|?>"

_REASONS = {
    "missing": "is missing",
    "empty": "is empty or only whitespace",
    "nul": "contains a NUL character",
    "undecodable": "contains bytes that are not UTF-8",
    "replacement": "contains U+FFFD, which replaces characters that could not be decoded",
    "unknown_label": "is not in data.labels",
}

_TextCheck = Callable[[pd.Series], pd.Series]

ROW_LEVEL_FIELDS = ("problem", "warning")
"""Columns that describe a row and not one of its fields."""

FAILURE_COLUMNS = ("index", "check", "field", "value", "reason")


def schema(
    shape: Shape, labels: Sequence[str] | None = None, special_tokens: Iterable[str] = ()
) -> pa.DataFrameSchema:
    """Return the schema for rows of a shape; other columns are not checked.

    Args:
        shape: defines the fields.
        labels: the allowed labels; null: any.
        special_tokens: the names of the tokenizer's special tokens.
    """
    columns: dict[str, pa.Column] = {
        "problem": pa.Column(checks=pa.Check(_always_fail, error="malformed"), nullable=True),
        "warning": pa.Column(checks=pa.Check(_always_fail, error="joined"), nullable=True),
    }
    for field in shape.columns:
        optional = field in shape.optional
        columns[field] = pa.Column(
            checks=_checks(field, optional, labels, tuple(special_tokens)), nullable=optional
        )
        # A missing cell is reported as missing, not as a cell of the wrong type.
        kinds = [*kinds_of(field), "missing", "undecodable"]
        columns[f"{field}_kind"] = pa.Column(
            checks=[
                pa.Check.isin(kinds, error="type"),
                pa.Check.ne("undecodable", error="undecodable"),
            ]
        )
    return pa.DataFrameSchema(columns)


def _checks(
    field: str, optional: bool, labels: Sequence[str] | None, special_tokens: tuple[str, ...]
) -> list[pa.Check]:
    of_text: dict[str, _TextCheck] = {
        "nul": functools.partial(_lacks, text="\0"),
        "replacement": functools.partial(_lacks, text="\ufffd"),
        "mojibake": _is_not_mojibake,
        "html": _lacks_entities,
        "control": functools.partial(_lacks_pattern, pattern=_CONTROL),
    }
    of_text["placeholder"] = functools.partial(_lacks_pattern, pattern=_PLACEHOLDER)
    if special_tokens:
        pattern = "|".join(map(re.escape, special_tokens))
        of_text["special_token"] = functools.partial(_lacks_pattern, pattern=pattern)
    if field == MESSAGES:  # check the content of the messages, not their JSON
        of_text = {name: functools.partial(_in_messages, check=c) for name, c in of_text.items()}
    checks = [pa.Check(check, error=name) for name, check in of_text.items()]
    if not optional:
        checks.append(pa.Check(_is_not_blank, error="empty"))
    if field == "label" and labels is not None:
        known = functools.partial(_is_one_of, known=frozenset(labels))
        checks.append(pa.Check(known, error="unknown_label"))
    if field == MESSAGES:
        checks.append(pa.Check(_is_conversation, error="messages"))
    return checks


def failures(rows: pd.DataFrame, checked: pa.DataFrameSchema, shape: Shape) -> pd.DataFrame:
    """Check rows and return every failure.

    Args:
        rows: as `gptj8.dataset.readers.formats.read_batches` yields them, with a unique index.
        checked: from `schema`.
        shape: the shape that the schema was made for.

    Returns:
        One row per failure, sorted by index and field: `index` (of the row), `check` (a name in
        `gptj8.dataset.validation.checks`), `field`, `value` (null if missing) and `reason`, a
        phrase that follows the column name. A malformed row has no other failures.
    """
    try:
        checked.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return pd.DataFrame(columns=list(FAILURE_COLUMNS))
    # pandera reports an exception in a check as a failure case without an index.
    if cases["index"].isna().any():
        raise RuntimeError(f"a check failed: {cases[cases['index'].isna()].iloc[0].to_dict()}")
    found = pd.DataFrame(
        {
            "index": cases["index"].astype("int64"),
            "check": cases["check"].replace("not_nullable", "missing"),
            "field": cases["column"].str.removesuffix("_kind"),
        }
    )
    found = _without_consequences(found, rows)
    order = {field: position for position, field in enumerate([*ROW_LEVEL_FIELDS, *shape.columns])}
    found = found.assign(order=found["field"].map(order)).sort_values(
        ["index", "order", "check"], kind="stable"
    )
    cells = list(zip(found["index"], found["field"], found["check"], strict=True))
    found["value"] = [None if f in ROW_LEVEL_FIELDS else rows.at[i, f] for i, f, _ in cells]
    found["reason"] = [_reason(rows, i, f, check, shape) for i, f, check in cells]
    return found[list(FAILURE_COLUMNS)].reset_index(drop=True)


def _without_consequences(found: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Drop failures that are consequences of another failure."""
    malformed = rows.index[rows["problem"].notna()]
    consequence = found["index"].isin(malformed) & (found["check"] != "malformed")
    cell = pd.MultiIndex.from_frame(found[["index", "field"]])
    # Bytes that are not UTF-8 were decoded to U+FFFD; a cell of the wrong type is not text.
    for cause in ("undecodable", "type"):
        caused = cell.isin(cell[found["check"] == cause])
        consequence |= caused & (found["check"] != cause)
    return found[~consequence]


def _reason(rows: pd.DataFrame, index: int, field: str, check: str, shape: Shape) -> str:
    if field in ROW_LEVEL_FIELDS:
        return rows.at[index, field]
    if check == "type":
        return _wrong_kind(rows.at[index, f"{field}_kind"], field, shape.columns[field])
    if check in _REASONS:
        return _REASONS[check]
    value = rows.at[index, field]
    if field == MESSAGES and check != "messages":
        value = "\n".join(texts_of(value))
    return _EXPLANATIONS[check](value)


def _explain_mojibake(value: str) -> str:
    start = max(0, next(i for i, c in enumerate(value) if not c.isascii()) - 20)
    part = value[start : start + 60]
    fixed = ftfy.fix_encoding(part)
    suggestion = f"; the original may be {fixed!r}" if fixed != part else ""
    return f"looks like UTF-8 decoded with another encoding{suggestion}"


def _explain_control(value: str) -> str:
    match = re.search(_CONTROL, value)
    return f"contains the control character {match.group() if match else ''!a}"


def _explain_placeholder(value: str) -> str:
    match = re.search(_PLACEHOLDER, value)
    return f"contains {match.group() if match else ''}, which the model gets as text"


def _explain_special(value: str) -> str:
    return "contains the name of a special token, which is encoded as plain text"


_EXPLANATIONS: dict[str, Callable[[str], str]] = {
    "mojibake": _explain_mojibake,
    "html": lambda value: f"contains the HTML entity {_first_entity(value)}",
    "control": _explain_control,
    "special_token": _explain_special,
    "placeholder": _explain_placeholder,
    "messages": lambda value: _conversation_problem(value) or "",
}


def _always_fail(values: pd.Series) -> pd.Series:
    """Fail every value; pandera passes only values that are not null to a check."""
    return pd.Series(False, index=values.index)


def _is_not_blank(values: pd.Series) -> pd.Series:
    return values.str.strip(INVISIBLE) != ""


def _lacks(values: pd.Series, text: str) -> pd.Series:
    return ~values.str.contains(text, regex=False)


def _lacks_pattern(values: pd.Series, pattern: str) -> pd.Series:
    return ~values.str.contains(pattern, regex=True)


def _lacks_entities(values: pd.Series) -> pd.Series:
    lacks = _lacks_pattern(values, _ENTITY)
    suspects = values[~lacks]
    # `&count;` is a C expression, not an entity.
    if len(suspects):
        lacks.loc[suspects.index] = [_first_entity(value) is None for value in suspects]
    return lacks


def _first_entity(text: str) -> str | None:
    for match in re.finditer(_ENTITY, text):
        entity = match.group()
        if entity[1] == "#" or entity[1:] in html5:
            return entity
    return None


def _in_messages(values: pd.Series, check: _TextCheck) -> pd.Series:
    return check(values.map(lambda cell: "\n".join(texts_of(cell))).astype("str"))


def _is_not_mojibake(values: pd.Series) -> pd.Series:
    passed = pd.Series(True, index=values.index)
    other = values[~values.str.isascii()]
    if len(other):  # most rows are plain ASCII, which is never mojibake
        passed.loc[other.index] = [not is_bad(value) for value in other]
    return passed


def _is_one_of(values: pd.Series, known: frozenset[str]) -> pd.Series:
    return values.str.strip().isin(known)


def _is_conversation(values: pd.Series) -> pd.Series:
    valid = [not v.strip(INVISIBLE) or _conversation_problem(v) is None for v in values]
    return pd.Series(valid, index=values.index, dtype=bool)


def _conversation_problem(cell: str) -> str | None:
    try:
        read_conversation(cell)
    except ValueError as error:
        return str(error)
    return None


def _wrong_kind(kind: str, field: str, column: str) -> str:
    if kind == "list" and field in ("label", "completion"):
        return f"is a list, not text; one answer is needed, such as its first item, {column}.0"
    return f"is {with_article(kind)}, not {'a list of messages' if field == MESSAGES else 'text'}"
