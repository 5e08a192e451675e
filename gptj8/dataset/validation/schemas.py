"""What a valid row is, as pandera schemas: one column schema a field, one frame schema a shape.

The schemas see rows as `gptj8.dataset.readers.formats` reads them: text, and beside it what kind of
cell it was. All failures of all rows are collected (`lazy`), none stops at the first.
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

from gptj8.dataset.readers.row_shapes import Shape, conversation_problem, conversation_text
from gptj8.dataset.text import INVISIBLE
from gptj8.params.templates import MESSAGES

# An answer may be a number in its file (label 0, completion 42); what it answers must be text.
# A column that is one of several in a template may be anything with a name.
_KINDS = {
    "text": ("text",),
    "prompt": ("text",),
    "label": ("text", "integer", "boolean"),
    "completion": ("text", "integer", "boolean"),
    MESSAGES: ("list", "text"),  # CSV has no lists, and spells them as JSON
}
_OTHER_KINDS = ("text", "integer", "number", "boolean")

_ENTITY = r"&(?:[a-zA-Z][a-zA-Z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});"
_CONTROL = r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"

_REASONS = {
    "missing": "is missing",
    "empty": "is empty or only whitespace",
    "nul": "holds a NUL character",
    "undecodable": "holds bytes that are not UTF-8",
    "replacement": "holds U+FFFD, what is left of a character in another encoding",
    "unknown_label": "is none of data.labels",
}

_TextCheck = Callable[[pd.Series], pd.Series]

OF_THE_ROW = ("problem", "warning")
"""What is said of a whole row and of no field."""

FAILURE_COLUMNS = ("index", "check", "field", "value", "reason")


def schema(
    shape: Shape, labels: Sequence[str] | None = None, special_tokens: Iterable[str] = ()
) -> pa.DataFrameSchema:
    """Return the schema of the rows of a shape; other columns are left alone.

    Args:
        shape: the fields.
        labels: the only ones there may be; null: any.
        special_tokens: what the tokenizer's special tokens are called.
    """
    columns: dict[str, pa.Column] = {
        "problem": pa.Column(checks=pa.Check(_none, error="malformed"), nullable=True),
        "warning": pa.Column(checks=pa.Check(_none, error="joined"), nullable=True),
    }
    for field in shape.columns:
        optional = field in shape.optional
        columns[field] = pa.Column(
            checks=_checks(field, optional, labels, tuple(special_tokens)), nullable=optional
        )
        # A missing cell is reported as such and not as one of the wrong type.
        kinds = [*_KINDS.get(field, _OTHER_KINDS), "missing", "undecodable"]
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
        "mojibake": _is_well_read,
        "html": _lacks_entities,
        "control": functools.partial(_lacks_pattern, pattern=_CONTROL),
    }
    if special_tokens:
        pattern = "|".join(map(re.escape, special_tokens))
        of_text["special_token"] = functools.partial(_lacks_pattern, pattern=pattern)
    if field == MESSAGES:  # what is said, and not how JSON spells it
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
        shape: the one that the schema is of.

    Returns:
        One line a failure, by index and field: `index` (of the row), `check` (a name of
        `gptj8.dataset.validation.checks`), `field`, `value` (null where missing) and `reason`,
        words to put behind the name of the column. Of a row that could not be taken apart that
        alone is said.
    """
    try:
        checked.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return pd.DataFrame(columns=list(FAILURE_COLUMNS))
    if cases["index"].isna().any():  # an exception in a check is a case to pandera, of no row
        raise RuntimeError(f"a check failed: {cases[cases['index'].isna()].iloc[0].to_dict()}")
    found = pd.DataFrame(
        {
            "index": cases["index"].astype("int64"),
            "check": cases["check"].replace("not_nullable", "missing"),
            "field": cases["column"].str.removesuffix("_kind"),
        }
    )
    found = _without_consequences(found, rows)
    order = {field: position for position, field in enumerate([*OF_THE_ROW, *shape.columns])}
    found = found.assign(order=found["field"].map(order)).sort_values(
        ["index", "order", "check"], kind="stable"
    )
    cells = list(zip(found["index"], found["field"], found["check"], strict=True))
    found["value"] = [None if f in OF_THE_ROW else rows.at[i, f] for i, f, _ in cells]
    found["reason"] = [_reason(rows, i, f, check) for i, f, check in cells]
    return found[list(FAILURE_COLUMNS)].reset_index(drop=True)


def _without_consequences(found: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Leave out what is wrong only because something else is."""
    malformed = rows.index[rows["problem"].notna()]
    consequence = found["index"].isin(malformed) & (found["check"] != "malformed")
    cell = pd.MultiIndex.from_frame(found[["index", "field"]])
    # Bytes that are not UTF-8 are shown as U+FFFD; a cell of the wrong type is no text to check.
    for cause in ("undecodable", "type"):
        caused = cell.isin(cell[found["check"] == cause])
        consequence |= caused & (found["check"] != cause)
    return found[~consequence]


def _reason(rows: pd.DataFrame, index: int, field: str, check: str) -> str:
    if field in OF_THE_ROW:
        return rows.at[index, field]
    if check == "type":
        return _wrong_kind(rows.at[index, f"{field}_kind"], field)
    if check in _REASONS:
        return _REASONS[check]
    value = rows.at[index, field]
    if field == MESSAGES and check != "messages":
        value = conversation_text(value)
    return _EXPLANATIONS[check](value)


def _explain_mojibake(value: str) -> str:
    start = max(0, next(i for i, c in enumerate(value) if not c.isascii()) - 20)
    part = value[start : start + 60]
    mended = ftfy.fix_encoding(part)
    meant = f"; {mended!r} may be meant" if mended != part else ""
    return f"looks like UTF-8 read as another encoding{meant}"


def _explain_control(value: str) -> str:
    match = re.search(_CONTROL, value)
    return f"holds the control character {match.group() if match else ''!a}"


def _explain_special(value: str) -> str:
    return "holds the name of a special token, which is encoded as plain text"


_EXPLANATIONS: dict[str, Callable[[str], str]] = {
    "mojibake": _explain_mojibake,
    "html": lambda value: f"holds the HTML entity {_first_entity(value)}",
    "control": _explain_control,
    "special_token": _explain_special,
    "messages": lambda value: conversation_problem(value) or "",
}


def _none(values: pd.Series) -> pd.Series:
    """Fail whatever is not null, which is all that pandera shows to a check."""
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
    # `&count;` is an expression of C and no entity.
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
    return check(values.map(conversation_text).astype("str"))


def _is_well_read(values: pd.Series) -> pd.Series:
    well = pd.Series(True, index=values.index)
    other = values[~values.str.isascii()]
    if len(other):  # mojibake is never plain ASCII, and most rows are
        well.loc[other.index] = [not is_bad(value) for value in other]
    return well


def _is_one_of(values: pd.Series, known: frozenset[str]) -> pd.Series:
    return values.str.strip().isin(known)


def _is_conversation(values: pd.Series) -> pd.Series:
    fine = [not v.strip(INVISIBLE) or conversation_problem(v) is None for v in values]
    return pd.Series(fine, index=values.index, dtype=bool)


def _wrong_kind(kind: str, field: str) -> str:
    article = "an" if kind[0] in "aeiou" else "a"
    return f"is {article} {kind}, not {'a list of messages' if field == MESSAGES else 'text'}"
