"""Describe why a dataset cannot be used: one line per problem, with the place and the fix.

The functions are pure: they depend only on the findings and the params.
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
from gptj8.runtime.messages import counted, excerpt, listed

_EXAMPLES = 3


def nothing_valid(data: Data, findings: Findings, total: int) -> str:
    """Return the error for a dataset without valid rows."""
    shown = "".join(f"; {problem}" for problem in _first_invalid(findings))
    remedy = _remedy(data, findings, total)
    return f"{data.train}: none of {total} rows is valid{f'; {remedy}' if remedy else ''}{shown}"


def invalid_rows(
    data: Data, findings: Findings, invalid: Mapping[str, int], total: Mapping[str, int]
) -> list[str]:
    """Return a problem if `data.on_invalid` or `data.max_invalid_fraction` forbids invalid rows.

    Args:
        invalid, total: the number of rows per split. The limit applies to each split, because a
            large train split would hide that half of a small test split is invalid.
    """
    count = sum(invalid.values())
    if not count:
        return []
    allowed = data.max_invalid_fraction
    too_many = [split for split in invalid if invalid[split] > allowed * total[split]]
    remedy = _remedy(data, findings, count) or "fix them, or raise it"
    if data.on_invalid == "error":
        policy = "data.on_invalid = error; fix them, or set it to drop"
    elif too_many:
        where = "" if len(total) == 1 else f" in {' and '.join(too_many)}"
        policy = f"more{where} than data.max_invalid_fraction = {allowed:g} allows; {remedy}"
    else:
        return []
    shown = _first_invalid(findings)
    more = f"; and {count - len(shown)} more" if count > len(shown) else ""
    rows = f"invalid rows: {count} of {sum(total.values())}"
    return [f"{rows}, {policy}: {'; '.join(shown)}{more}"]


def _remedy(data: Data, findings: Findings, count: int) -> str | None:
    """Return what helps if most of the invalid rows have the same cause."""
    if 2 * findings.count("room") >= count:
        return (
            f"most answers do not fit within data.max_length = {data.max_length} with their "
            "prompts: raise data.max_length"
        )
    if 2 * findings.count("unknown_label") >= count:
        return "most labels are not in data.labels: correct that list"
    if 2 * findings.count("undecodable") >= count:
        return (
            "most rows are not in UTF-8: save the file as UTF-8, or set data.encoding, such as "
            "cp1251 or gb18030"
        )
    return None


def spelled_alike(names: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
    """Return groups of labels that differ only in spelling, as numbers, most frequent first."""
    alike: dict[str, list[int]] = {}
    for number in sorted(range(len(names)), key=lambda number: -counts[number]):
        visible = names[number].strip(INVISIBLE)
        spelling = " ".join(canonical_words(visible, "NFC")).casefold()
        alike.setdefault(spelling, []).append(number)
    return [numbers for numbers in alike.values() if len(numbers) > 1]


def label_spellings(data: Data, names: Sequence[str], counts: Sequence[int]) -> str:
    """Return the problem of labels that differ only in spelling, given most frequent first."""
    described = " and ".join(
        f"{name!r} ({counted(count, 'row')})" for name, count in zip(names, counts, strict=True)
    )
    return (
        f"labels {described} in column {data.label_column} differ only in case, "
        f"whitespace or Unicode form; use {names[0]!r} for all"
    )


def leaks(check: str, pairs: Mapping[tuple[int, int], int], example: Any) -> str:
    """Return the problem of texts that occur in two splits.

    Args:
        check: `leak` or `near_leak`.
        pairs: (split, later split) -> the number of rows of the first that are also in the second.
        example: a finding.
    """
    counts = ", ".join(
        f"{count} in {SPLITS[one]} and {SPLITS[other]}"
        for (one, other), count in sorted(pairs.items())
    )
    texts = "near-duplicate texts" if check == "near_leak" else "identical texts"
    way_out = "set it to drop to keep only the copy in the later split"
    if check == "near_leak":
        way_out += ", or raise data.near_duplicate_threshold"
    return (
        f"{texts} are in two splits ({counts}), for example {_place(example)} and "
        f"{example.other_file} row {example.other_row}{_shown(example.value)}; "
        f"data.on_leak = error: fix them, or {way_out}"
    )


def same_rows(data: Data, split: str, other: str, count: int) -> str:
    """Return the problem of a split whose rows are all in a later split."""
    rows = f"all {count:,} rows" if count > 1 else "the only row"
    return (
        f"{rows} of {split} are also in {other}: the files of {split} and {other} have the same "
        f"texts; give each split rows of its own, or leave data.{other} unset to hold rows out"
    )


def splits(
    data: Data,
    rows: Mapping[str, int],
    labels: Mapping[str, Counter[str]] | None,
    with_files: Collection[str],
) -> list[str]:
    """Return the problems of splits with too few rows or labels to train or evaluate on.

    Args:
        rows: the number of rows per split.
        labels: the number of rows per label in each split; null unless the task is classification.
        with_files: splits that have their own files.
    """
    if labels is not None and len(known := set().union(*labels.values())) == 1:
        return [
            f"{data.train} has only one label, {known.pop()!r} in column {data.label_column}; "
            "classification needs at least two"
        ]
    needed = 1 if labels is None else 2
    problems, too_few = [], []
    for name, count in rows.items():
        if (min(count, 1) if labels is None else len(labels[name])) >= needed:
            continue
        if name not in with_files:
            too_few.append(name)
        elif labels is not None and set(labels[name]) == {"-1"}:
            continue  # `unseen_labels` says what it is
        elif not count or labels is None:
            problems.append(f"the {name} split has no rows left; add rows to data.{name}")
        else:
            label = next(iter(labels[name]))
            problems.append(f"the {name} split has only one label, {label!r}; it needs two")
    if too_few:
        with_labels = "" if needed == 1 else " with at least two labels each"
        problems.append(
            f"{data.train} has too few texts to hold out {' and '.join(too_few)}{with_labels}; add "
            f"rows, or set {' and '.join(f'data.{name}' for name in too_few)}; near-duplicates "
            "(data.near_duplicate_threshold) are held out together"
        )
    return problems


def missing_labels(data: Data, known: Collection[str]) -> list[str]:
    """Return a problem if train has no rows for a label in `data.labels`."""
    missing = sorted(set(data.labels or ()) - set(known))
    if not missing:
        return []
    return [f"data.labels lists {listed(missing, 10)}, which no row in train has; fix the list"]


def unseen_labels(split: str, labels: Sequence[str]) -> str:
    """Return the problem of labels in a split that are missing from train."""
    if list(labels) == ["-1"]:
        return (
            f"rows of {split} have the label -1, which train does not have; it marks rows without "
            f"a label, as in the public test split of many benchmarks; use another file for "
            f"data.{split}"
        )
    return (
        f"labels in {split} that are missing from train: {listed(labels, 10)}; add rows with them "
        f"to train, or remove them from {split}"
    )


def _first_invalid(findings: Findings) -> list[str]:
    """Return descriptions of the first invalid rows, one per check before a second of any."""
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
