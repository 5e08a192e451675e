"""Why a dataset is refused, in one line each that says where, how much, and the way out.

Pure functions of what was found and of the params that decide about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.text import INVISIBLE, canonical_words
from gptj8.dataset.validation.checks import CHECKS, Kind
from gptj8.dataset.validation.findings import Findings
from gptj8.params.sections import Data
from gptj8.runtime.messages import excerpt, listed

_EXAMPLES = 3


def nothing_valid(data: Data, findings: Findings, total: int) -> str:
    """Say that no row is left."""
    shown = "".join(f"; {problem}" for problem in _first_invalid(findings))
    return f"{data.train}: not one of {total} rows is valid{shown}"


def invalid_rows(
    data: Data, findings: Findings, invalid: Mapping[str, int], total: Mapping[str, int]
) -> list[str]:
    """Refuse rows that cannot be used, if `data.on_invalid` and its limit do.

    Args:
        invalid, total: rows of each split; each is judged by itself, or a large train would hide
            that half of a small test is gone.
    """
    count = sum(invalid.values())
    if not count:
        return []
    allowed = data.max_invalid_fraction
    too_many = [split for split in invalid if invalid[split] > allowed * total[split]]
    if data.on_invalid == "error":
        policy = "data.on_invalid is error; mend them, or set it to drop"
    elif too_many:
        where = "" if len(total) == 1 else f" in {' and '.join(too_many)}"
        policy = (
            f"more{where} than data.max_invalid_fraction = {allowed:g} allows to drop; mend them, "
            "or raise it"
        )
    else:
        return []
    shown = _first_invalid(findings)
    more = f"; and {count - len(shown)} more" if count > len(shown) else ""
    rows = f"invalid rows: {count} of {sum(total.values())}"
    return [f"{rows}, {policy}: {'; '.join(shown)}{more}"]


def spelled_alike(names: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
    """Return the labels that only look different, by number, the commonest first."""
    alike: dict[str, list[int]] = {}
    for number in sorted(range(len(names)), key=lambda number: -counts[number]):
        visible = names[number].strip(INVISIBLE)
        spelling = " ".join(canonical_words(visible, "NFC")).casefold()
        alike.setdefault(spelling, []).append(number)
    return [numbers for numbers in alike.values() if len(numbers) > 1]


def label_spellings(data: Data, names: Sequence[str], counts: Sequence[int]) -> str:
    """Refuse labels that differ only in case, spaces or Unicode form; the commonest comes first."""
    described = " and ".join(
        f"{name!r} ({count} rows)" for name, count in zip(names, counts, strict=True)
    )
    return (
        f"labels {described} in column {data.label_column} differ only in case, spaces "
        f"or Unicode form; write {names[0]!r} for all"
    )


def leaks(check: str, pairs: Mapping[tuple[int, int], int], example: Any) -> str:
    """Refuse texts that are in two splits.

    Args:
        check: `leak` or `near_leak`.
        pairs: how many rows of a split, by number, are in which later one.
        example: a finding.
    """
    counts = ", ".join(
        f"{count} in {SPLITS[one]} and {SPLITS[other]}"
        for (one, other), count in sorted(pairs.items())
    )
    almost = "nearly " if check == "near_leak" else ""
    way_out = "set it to drop to keep each in the later split only"
    if almost:
        way_out += ", or raise data.near_duplicate_threshold"
    return (
        f"some texts are {almost}in two splits ({counts}), for example {_place(example)} and "
        f"{example.other_file} row {example.other_row}{_shown(example.value)}; data.on_leak is "
        f"error: mend them, or {way_out}"
    )


def splits(
    data: Data,
    rows: Mapping[str, int],
    labels: Mapping[str, Counter[str]] | None,
    with_files: Collection[str],
) -> list[str]:
    """Refuse splits that have too little to learn from or to measure.

    Args:
        rows: of each split.
        labels: rows of each label in each split, of a classification.
        with_files: splits that have files of their own.
    """
    if labels is not None and len(known := set().union(*labels.values())) == 1:
        return [
            f"{data.train} has one label only, {known.pop()!r} in column {data.label_column}; "
            "classification needs at least two"
        ]
    needed = 1 if labels is None else 2
    problems, too_few = [], []
    for name, count in rows.items():
        if (min(count, 1) if labels is None else len(labels[name])) >= needed:
            continue
        if name not in with_files:
            too_few.append(name)
        elif not count or labels is None:
            problems.append(f"the {name} split has no rows left; add rows to data.{name}")
        else:
            label = next(iter(labels[name]))
            problems.append(f"the {name} split has one label only, {label!r}; it needs two")
    if too_few:
        what = "texts" if needed == 1 else "texts of at least two labels"
        problems.append(
            f"{data.train} has too few {what} to hold out {' and '.join(too_few)}; add rows, or "
            f"name files in {' and '.join(f'data.{name}' for name in too_few)}; near-duplicates "
            "are held out together, and data.near_duplicate_threshold says which texts are"
        )
    return problems


def missing_labels(data: Data, known: Collection[str]) -> list[str]:
    """Refuse a train split that lacks a label of `data.labels`."""
    missing = sorted(set(data.labels or ()) - set(known))
    if not missing:
        return []
    return [f"data.labels names {listed(missing, 10)}, which no row of train has; mend the list"]


def unseen_labels(split: str, labels: Sequence[str]) -> str:
    """Refuse labels that train never shows."""
    return (
        f"labels in {split} that train never shows: {listed(labels, 10)}; add rows with them to "
        f"train or remove them from {split}"
    )


def _first_invalid(findings: Findings) -> list[str]:
    """Return the first invalid rows, one of each check before the second of any."""
    found = [
        examples.assign(turn=range(len(examples)))
        for check, examples in findings.examples.items()
        if CHECKS[check].kind is Kind.INVALID
    ]
    rows = pd.concat(found).sort_values("turn", kind="stable").drop_duplicates(["file", "row"])
    return [
        f"{_place(row)}: {f'{row.column} '.lstrip()}{row.reason}{_shown(row.value)}"
        for row in rows.head(_EXAMPLES).itertuples()
    ]


def _place(row: Any) -> str:
    return f"{row.file} row {row.row}"


def _shown(value: object) -> str:
    text = excerpt(value) if isinstance(value, str) else ""
    return f" ({text!r})" if text else ""
