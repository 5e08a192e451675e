"""What `validate` tells of a dataset: numbers for machines, tables for plots, words for people.

Nothing here depends on the time or the machine: the same dataset gives the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from gptj8.dataset import SPLITS
from gptj8.files import replace_directory, write_json
from gptj8.validation import INVALID_CHECKS, Validated, excerpt

_BINS = 16  # up to max_length; one more holds what is longer
_EXAMPLES = 5
_LABELS = 30

_HEADINGS = {
    "missing": "missing cells",
    "type": "cells of the wrong type",
    "empty": "empty texts",
    "nul": "texts with a NUL character",
    "replacement": "texts with U+FFFD, read with the wrong encoding at some time",
    "room": "answers that fill max_length",
    "duplicate": "duplicates within a split",
    "leak": "texts that are in a later split as well",
    "conflict": "texts with different answers",
    "truncated": "texts longer than max_length",
}


def metrics(validated: Validated) -> dict[str, int]:
    """Return the numbers of metrics.json, all of them counts of rows, labels or tokens.

    `tokens` and `train_tokens` are those that fit into max_length, `tokens_max` is the longest row
    before it is cut.
    """
    splits = validated.splits
    counts = {
        "rows": validated.total_rows,
        "rejected_rows": validated.count(*INVALID_CHECKS),
        "duplicate_rows": validated.count("duplicate"),
        "leaked_rows": validated.count("leak"),
        "conflicting_rows": validated.count("conflict"),
        "truncated_rows": validated.count("truncated"),
    }
    counts |= {f"{name}_rows": len(splits[name]) for name in SPLITS}
    if validated.task == "classification":
        counts["labels"] = splits["train"]["label"].nunique()
    used = {name: int((rows["tokens"] - rows["cut_tokens"]).sum()) for name, rows in splits.items()}
    counts["tokens"] = sum(used.values())
    counts["train_tokens"] = used["train"]
    counts["tokens_max"] = max(int(rows["tokens"].max()) for rows in splits.values())
    return counts


def label_counts(validated: Validated) -> pd.DataFrame:
    """Return `split`, `label` and `rows`; a task without labels has one, `(all)`."""
    counts = []
    for name in SPLITS:
        rows = validated.splits[name]
        labels = rows["label"] if "label" in rows else pd.Series("(all)", index=rows.index)
        found = labels.value_counts().sort_index()
        counts.append(pd.DataFrame({"split": name, "label": found.index, "rows": found.values}))
    return pd.concat(counts, ignore_index=True)


def token_lengths(validated: Validated, max_length: int) -> pd.DataFrame:
    """Return a histogram: `split`, `tokens` (the shortest length in the bin) and `rows`.

    The same bins for every split; the last one begins above `max_length` and has no end.
    """
    width = math.ceil(max_length / _BINS)
    starts = [*range(1, max_length + 1, width), max_length + 1]
    parts = []
    for name in SPLITS:
        tokens = validated.splits[name]["tokens"]
        binned = pd.cut(tokens, [*starts, math.inf], right=False, labels=starts)
        rows = binned.value_counts().reindex(starts, fill_value=0)
        parts.append(pd.DataFrame({"split": name, "tokens": starts, "rows": rows.to_numpy()}))
    return pd.concat(parts, ignore_index=True)


def write_report(directory: str | Path, validated: Validated, max_length: int) -> dict[str, int]:
    """Write metrics.json, labels.csv, token_lengths.csv and report.md; return the metrics."""
    numbers = metrics(validated)
    with replace_directory(directory) as staging:
        write_json(staging / "metrics.json", numbers)
        label_counts(validated).to_csv(staging / "labels.csv", index=False)
        token_lengths(validated, max_length).to_csv(staging / "token_lengths.csv", index=False)
        words = _describe(validated, numbers, max_length)
        (staging / "report.md").write_text(words, encoding="utf-8")
    return numbers


def _describe(validated: Validated, numbers: dict[str, int], max_length: int) -> str:
    splits = validated.splits.values()
    files = list(dict.fromkeys(file for rows in splits for file in rows["file"].unique()))
    lines = [
        "# The dataset",
        "",
        f"Task: {validated.task}. Read {numbers['rows']:,} rows from {', '.join(files)}.",
        "",
        *_table(["", *SPLITS], _overview(validated, max_length)),
        "",
    ]
    if validated.task == "classification":
        lines += ["## Labels", "", *_label_table(validated), ""]
    lines += ["## Findings", ""]
    if validated.findings.empty:
        lines += ["None.", ""]
    for (check, dropped), found in validated.findings.groupby(["check", "dropped"], sort=False):
        rows = found[["split", "file", "row"]].drop_duplicates()
        action = "left out, listed in rejected.parquet" if dropped else "kept"
        lines += [f"### {_HEADINGS[check]}: {len(rows):,} rows, {action}", ""]
        for example in found.head(_EXAMPLES).itertuples():
            value = excerpt(example.value) if isinstance(example.value, str) else ""
            shown = f": `{value.replace('`', chr(39))}`" if value else ""
            lines.append(
                f"- {example.file} row {example.row} ({example.split}): "
                f"{example.column} {example.reason}{shown}"
            )
        if len(found) > _EXAMPLES:
            lines.append(f"- and {len(found) - _EXAMPLES:,} more")
        lines.append("")
    return "\n".join(lines)


def _overview(validated: Validated, max_length: int) -> list[list[str]]:
    splits = [validated.splits[name] for name in SPLITS]
    tokens = [rows["tokens"] for rows in splits]
    return [
        ["rows", *(f"{len(rows):,}" for rows in splits)],
        ["tokens, median", *(f"{lengths.median():,.0f}" for lengths in tokens)],
        ["tokens, longest", *(f"{lengths.max():,}" for lengths in tokens)],
        [
            f"rows cut at max_length = {max_length}",
            *(f"{(rows['cut_tokens'] > 0).sum():,}" for rows in splits),
        ],
    ]


def _label_table(validated: Validated) -> list[str]:
    counts = label_counts(validated).pivot(index="label", columns="split", values="rows")
    counts = counts.reindex(columns=list(SPLITS)).fillna(0).astype(int)
    counts = counts.sort_values("train", ascending=False, kind="stable")
    rows = [[label, *(f"{n:,}" for n in counts.loc[label])] for label in counts.index[:_LABELS]]
    if len(counts) > _LABELS:
        rows.append([f"and {len(counts) - _LABELS} more labels", "", "", ""])
    return _table(["label", *SPLITS], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(excerpt(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)]
