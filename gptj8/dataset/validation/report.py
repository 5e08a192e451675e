"""Write the report of `validate`: metrics as JSON, tables for plots, and an HTML page.

The page does not depend on the time or the machine: the same dataset gives a byte-identical page.
"""

from __future__ import annotations

import difflib
import math
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.validation.checks import CHECKS, Check, Kind
from gptj8.dataset.validation.shifts import label_shift, length_shift
from gptj8.dataset.validation.validated import Validated
from gptj8.params.sections import Data
from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.files import format_bytes, hash_file, replace_directory, write_json
from gptj8.runtime.machine import peak_memory_gib
from gptj8.runtime.messages import describe_p_value, listed
from gptj8.runtime.tables import write_csv

_BINS = 16  # bins up to max_length; one more bin holds longer rows
_LABELS = 50
_FEW_ROWS = 10  # labels with fewer rows are too rare to learn or to evaluate
_IMBALANCE = 10
_FILES = 1000  # listed on the page
_SHOWN = 400  # characters shown per text


def write_report(
    directory: str | Path, validated: Validated, data: Data, prepared: str | Path
) -> None:
    """Write report.html, metrics.json, inputs.json, labels.csv and token_lengths.csv.

    If the dataset has problems, only report.html and findings.parquet are written.

    Args:
        directory: the directory to replace.
        validated: the result of `validate`.
        data: the params.
        prepared: the directory of the prepared dataset.
    """
    with replace_directory(directory) as staging:
        files = input_files(validated)
        page = render(validated, data, files)
        (staging / "report.html").write_text(page, encoding="utf-8")
        if validated.problems:  # the prepared dataset, which holds the findings, is not kept
            shutil.copy(validated.findings.path, staging)
        else:
            write_json(staging / "metrics.json", metrics(validated))
            inputs = {"files": files, "prepared": dvc_digest(prepared)}
            write_json(staging / "inputs.json", inputs)
            labels = label_counts(validated)
            write_csv(staging / "labels.csv", labels.to_dict("records"), list(labels))
            lengths = token_lengths(validated, data.max_length)
            # One column per split, because DVC plots one line per column.
            by_split = lengths.pivot(index="tokens", columns="split", values="rows")
            by_split = by_split[list(SPLITS)].reset_index()
            write_csv(staging / "token_lengths.csv", by_split.to_dict("records"), list(by_split))


def input_files(validated: Validated) -> list[dict[str, Any]]:
    """Return `split`, `path`, `bytes`, `md5` (as in DVC) and `sha256` for each input file."""
    found = []
    for split, paths in validated.files.items():
        for path in paths:
            digests = hash_file(path, "md5", "sha256")
            size = path.stat().st_size
            found.append({"split": split, "path": path.as_posix(), "bytes": size, **digests})
    return found


def metrics(validated: Validated) -> dict[str, Any]:
    """Return the numbers of metrics.json: counts of rows, labels and tokens, shifts, and speed.

    `tokens` and `train_tokens` count tokens within max_length. `tokens_max` is the length of the
    longest row before truncation. `length_shift` and `label_shift` are the largest distance between
    a split and train, 0 to 1. `findings/<check>` is the number of rows per check with findings.
    """
    found = validated.findings
    counts: dict[str, Any] = {
        "rows": validated.total_rows.total(),
        "rejected_rows": found.dropped_rows,
        "invalid_rows": validated.invalid_rows.total(),
        "duplicate_rows": found.count("duplicate"),
        "near_duplicate_rows": found.count("near_duplicate"),
        "leaked_rows": found.count("leak", "near_leak"),
        "near_leaked_rows": found.count("near_leak"),
        "conflicting_rows": found.count("conflict"),
        "truncated_rows": found.count("truncated"),
        "suspect_rows": found.count("joined", "mojibake", "html", "control", "special_token"),
    }
    counts |= {f"{name}_rows": validated.rows.get(name, 0) for name in SPLITS}
    if validated.task == "classification":
        counts["labels"] = len(validated.labels["train"])
    counts["tokens"] = sum(validated.tokens.values())
    counts["train_tokens"] = validated.tokens["train"]
    counts["tokens_max"] = max(len(lengths) - 1 for lengths in validated.lengths.values())
    shifts = _shifts(validated)
    counts["length_shift"] = max((s.length.distance for s in shifts), default=0.0)
    if validated.task == "classification":
        counts["label_shift"] = max((s.label.distance for s in shifts if s.label), default=0.0)
    counts |= {f"findings/{check}": found.count(check) for check in found.checks()}
    counts["seconds"] = validated.seconds
    counts["rows_per_second"] = counts["rows"] / max(validated.seconds, 1e-9)
    counts["peak_memory_gib"] = peak_memory_gib()
    return counts


def label_counts(validated: Validated) -> pd.DataFrame:
    """Return `split`, `label` and `rows`; without labels, the only label is `(all)`."""
    counts = [
        (name, label, rows)
        for name in SPLITS
        for label, rows in sorted(_labels(validated, name).items())
    ]
    return pd.DataFrame(counts, columns=["split", "label", "rows"])


def token_lengths(validated: Validated, max_length: int) -> pd.DataFrame:
    """Return a histogram: `split`, `tokens` (the smallest length in the bin) and `rows`.

    All splits have the same bins. The last bin holds all lengths above `max_length`.
    """
    width = math.ceil(max_length / _BINS)
    starts = [*range(1, max_length + 1, width), max_length + 1]
    parts = []
    for name in SPLITS:
        lengths = validated.lengths[name]
        total = np.concatenate([[0], np.cumsum(lengths)])
        edges = np.minimum([*starts, len(lengths)], len(lengths))
        rows = np.diff(total[edges])
        parts.append(pd.DataFrame({"split": name, "tokens": starts, "rows": rows}))
    return pd.concat(parts, ignore_index=True)


def notes(validated: Validated, max_length: int) -> list[str]:
    """Return notes on the dataset that do not belong to single rows."""
    found = [f"{note}." for note in validated.notes]
    for shift in _shifts(validated):
        for words, compared in (("lengths", shift.length), ("labels", shift.label)):
            if compared is not None and compared.notable:
                found.append(
                    f"The {words} of {shift.split} and train are distributed differently: distance "
                    f"{compared.distance:.2f} (0: identical, 1: no overlap), "
                    f"{describe_p_value(compared.p_value)}."
                )
    train = validated.labels["train"]
    if train:
        most, least = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        if train[most] > _IMBALANCE * train[least]:
            found.append(
                f"Labels are imbalanced: train has {train[most]:,} rows of {most!r} and "
                f"{train[least]:,} of {least!r}. Always answering {most!r} is correct for "
                f"{train[most] / train.total():.0%} of train; compare accuracy with that share, "
                "and use macro_f1."
            )
        few = [label for label, rows in train.items() if rows < _FEW_ROWS]
        if few:
            found.append(
                f"Labels with fewer than {_FEW_ROWS} rows in train: {listed(sorted(few), 10)}."
            )
    cut = validated.findings.count("truncated", split="train")
    if validated.rows.get("train") and cut > 0.1 * validated.rows["train"]:
        found.append(
            f"{cut / validated.rows['train']:.0%} of train is longer than data.max_length = "
            f"{max_length} and is truncated."
        )
    if validated.ignored:
        names = [path.as_posix() for path in validated.ignored]
        found.append(f"Files that were not read or have no rows: {listed(names, 10)}.")
    return found


def render(validated: Validated, data: Data, files: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as self-contained HTML without scripts; `files` is from `input_files`."""
    environment = Environment(
        loader=PackageLoader("gptj8.dataset.validation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["bytes"] = format_bytes
    environment.filters["visible"] = _visible
    return environment.get_template("report.html").render(
        data=data,
        splits=SPLITS,
        validated=validated,
        problems=validated.problems,
        notes=notes(validated, data.max_length),
        overview=_overview(validated),
        labels=_label_rows(validated),
        histograms=list(_histograms(validated, data.max_length)),
        sections=list(_sections(validated)),
        quiet=[check for name, check in CHECKS.items() if not validated.findings.count(name)],
        files=files,
        most_files=_FILES,
    )


# --- content of the page -------------------------------------------------------------------------


class _SplitShift(NamedTuple):
    split: str
    length: Any
    label: Any


class Section(NamedTuple):
    """The findings of one check.

    Attributes:
        actions: what happened to the rows.
        examples: `place`, `reason` and `parts`, the text in marked and unmarked pieces; for a
            relation, also `other_place` and `other_parts`.
    """

    name: str
    check: Check
    rows: int
    by_split: list[int]
    actions: str
    examples: list[dict[str, Any]]


def _shifts(validated: Validated) -> list[_SplitShift]:
    reference = validated.lengths["train"]
    if not reference.sum():
        return []
    found = []
    for name in SPLITS[1:]:
        lengths = validated.lengths[name]
        if not lengths.sum():
            continue
        labels = None
        if validated.task == "classification":
            known = sorted(set(validated.labels["train"]) | set(validated.labels[name]))
            counts = [np.array([validated.labels[s][k] for k in known]) for s in ("train", name)]
            labels = label_shift(*counts)
        found.append(_SplitShift(name, length_shift(reference, lengths), labels))
    return found


def _labels(validated: Validated, split: str) -> dict[str, int]:
    if validated.task == "classification":
        return dict(validated.labels[split])
    return {"(all)": validated.rows[split]} if validated.rows.get(split) else {}


def _overview(validated: Validated) -> list[tuple[str, list[str]]]:
    cut = [validated.findings.count("truncated", split=name) for name in SPLITS]
    return [
        ("rows", [f"{validated.rows.get(name, 0):,}" for name in SPLITS]),
        ("tokens within max_length", [f"{validated.tokens[name]:,}" for name in SPLITS]),
        ("tokens per row, median", [_quantile(validated.lengths[name], 0.5) for name in SPLITS]),
        (
            "tokens per row, 95th percentile",
            [_quantile(validated.lengths[n], 0.95) for n in SPLITS],
        ),
        ("tokens per row, maximum", [_quantile(validated.lengths[name], 1) for name in SPLITS]),
        ("rows truncated at max_length", [f"{count:,}" for count in cut]),
    ]


def _quantile(lengths: np.ndarray, share: float) -> str:
    total = np.cumsum(lengths)
    return f"{int(np.searchsorted(total, share * total[-1])):,}" if total[-1] else "-"


def _label_rows(validated: Validated) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return the rows and share in percent per split for each label, most frequent first."""
    if validated.task != "classification":
        return []
    totals = {name: max(1, validated.labels[name].total()) for name in SPLITS}
    known = sorted({label for name in SPLITS for label in validated.labels[name]})
    known.sort(key=lambda label: -validated.labels["train"][label])
    rows = []
    for label in known[:_LABELS]:
        counts = [validated.labels[name][label] for name in SPLITS]
        shares = [100 * n / totals[name] for n, name in zip(counts, SPLITS, strict=True)]
        rows.append((label, list(zip(counts, shares, strict=True))))
    return rows


def _histograms(validated: Validated, max_length: int) -> Iterator[dict[str, Any]]:
    table = token_lengths(validated, max_length)
    for name, part in table.groupby("split", sort=False):
        total = max(1, int(part["rows"].sum()))
        shares = 100 * part["rows"] / total
        ends = [str(start - 1) for start in part["tokens"].tolist()[1:]] + ["more"]
        bars = [
            {
                "label": f"{start} to {end}" if end != "more" else f"over {start - 1}",
                "rows": int(rows),
                "share": float(share),
                "height": float(share / max(shares.max(), 1e-9)),
                "over": end == "more",
            }
            for start, end, rows, share in zip(
                part["tokens"], ends, part["rows"], shares, strict=True
            )
        ]
        yield {"split": name, "bars": bars, "rows": int(part["rows"].sum())}


def _sections(validated: Validated) -> Iterator[Section]:
    findings = validated.findings
    for name in findings.checks():
        count, dropped = findings.count(name), findings.dropped(name)
        actions = f"{dropped:,} dropped" if dropped else "kept"
        if dropped and dropped < count:
            actions += f", {count - dropped:,} kept"
        if CHECKS[name].kind is Kind.FATAL:
            actions = "dataset rejected"
        examples = [_example(row) for row in findings.examples[name].itertuples()]
        by_split = [findings.count(name, split=split) for split in SPLITS]
        yield Section(name, CHECKS[name], count, by_split, actions, examples)


def _example(row: Any) -> dict[str, Any]:
    value = row.value if isinstance(row.value, str) else ""
    example = {
        "place": f"{row.file} row {row.row}",
        "split": row.split,
        "column": row.column,
        "reason": row.reason,
        "parts": [(_shorten(value), False)],
        "other_place": "",
    }
    if isinstance(row.other_file, str):
        mine, other = _compare(value, row.other_value)
        example |= {
            "parts": mine,
            "other_place": f"{row.other_file} row {int(row.other_row)}",
            "other_parts": other,
        }
    return example


def _compare(one: str, other: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return both texts in pieces, each with whether it is missing from the other text."""
    first, second = _shorten(one).split(" "), _shorten(other).split(" ")
    sides: tuple[list[tuple[str, bool]], ...] = ([], [])
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        for side, words in zip(sides, (first[i:j], second[k:m]), strict=True):
            if words:
                side.append((" ".join(words), tag != "equal"))
    return sides[0], sides[1]


def _visible(text: str) -> str:
    """Escape characters that are invisible or change the text direction."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\u{ord(c):04x}"
        for c in text
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"
