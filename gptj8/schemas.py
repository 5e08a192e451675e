"""What a valid row is, as pandera schemas: one column schema a field, one frame schema a task.

The schemas see rows as `gptj8.formats` reads them: text, and beside it what kind of cell it was.
All failures of all rows are collected (`lazy`), none stops at the first.
"""

from __future__ import annotations

import functools

import pandas as pd
import pandera.pandas as pa

# An answer may be a number in its file (label 0, completion 42); what it answers must be text.
_KINDS = {
    "text": ("text",),
    "prompt": ("text",),
    "label": ("text", "integer", "boolean"),
    "completion": ("text", "integer", "boolean"),
}

_REASONS = {
    "missing": "is missing",
    "empty": "is empty or only whitespace",
    "nul": "holds a NUL character",
    "replacement": "holds U+FFFD, what is left of a character in another encoding",
}

FAILURE_COLUMNS = ("index", "check", "field", "value", "reason")


def schema(fields: tuple[str, ...]) -> pa.DataFrameSchema:
    """Return the schema of a frame with these fields; other columns are left alone."""
    columns: dict[str, pa.Column] = {}
    for field in fields:
        columns[field] = pa.Column(
            checks=[
                pa.Check(_is_not_blank, error="empty"),
                pa.Check(functools.partial(_lacks, character="\0"), error="nul"),
                pa.Check(functools.partial(_lacks, character="\ufffd"), error="replacement"),
            ],
            nullable=False,
        )
        # A missing cell is reported as such and not as one of the wrong type.
        kinds = [*_KINDS[field], "missing"]
        columns[f"{field}_kind"] = pa.Column(checks=pa.Check.isin(kinds, error="type"))
    return pa.DataFrameSchema(columns)


def failures(rows: pd.DataFrame, fields: tuple[str, ...]) -> pd.DataFrame:
    """Check rows and return every failure.

    Args:
        rows: as `gptj8.formats.read_rows` returns them, with a unique index.
        fields: the fields to check.

    Returns:
        One line a failure, by index and field: `index` (of the row), `check` (`missing`, `empty`,
        `type`, `nul`, `replacement`), `field`, `value` (null where missing) and `reason`, words to
        put behind the name of the column.
    """
    try:
        schema(fields).validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return pd.DataFrame(columns=list(FAILURE_COLUMNS))
    found = pd.DataFrame(
        {
            "index": cases["index"].astype("int64"),
            "check": cases["check"].replace("not_nullable", "missing"),
            "field": cases["column"].str.removesuffix("_kind"),
        }
    )
    found["value"] = [
        rows.at[index, field] for index, field in zip(found["index"], found["field"], strict=True)
    ]
    found["reason"] = [
        _wrong_kind(rows.at[index, f"{field}_kind"]) if check == "type" else _REASONS[check]
        for index, field, check in zip(found["index"], found["field"], found["check"], strict=True)
    ]
    order = {field: position for position, field in enumerate(fields)}
    found = found.assign(order=found["field"].map(order)).sort_values(
        ["index", "order", "check"], kind="stable"
    )
    return found[list(FAILURE_COLUMNS)].reset_index(drop=True)


def _is_not_blank(values: pd.Series) -> pd.Series:
    return values.str.strip() != ""


def _lacks(values: pd.Series, character: str) -> pd.Series:
    return ~values.str.contains(character, regex=False)


def _wrong_kind(kind: str) -> str:
    article = "an" if kind[0] in "aeiou" else "a"
    return f"is {article} {kind}, not text"
