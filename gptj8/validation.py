"""Checks that find what ruins fine-tuning, and the policies for what they find.

`validate` is the whole of it, from params to splits: rows that are not usable, duplicates within a
split, texts that leak from one split into another, labels that contradict each other or differ only
in case, labels that training never sees, and texts too long for the model. What cannot be mended by
leaving rows out is an error. Nothing disappears silently: every row left out becomes a finding.

Two texts are the same if `gptj8.sources.content_key` says so, which ignores whitespace and nothing
else. All checks are exact, and the rows of all splits are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from gptj8 import schemas
from gptj8.dataset import FIELDS, SPLITS
from gptj8.errors import UserError
from gptj8.params import Data
from gptj8.prompts import PromptEncoder, TextEncoder
from gptj8.sources import columns_of, content_key, hold_out, read_splits

INVALID_CHECKS = ("missing", "type", "empty", "nul", "replacement", "room")
FINDING_COLUMNS = ("split", "file", "row", "check", "column", "value", "reason")

_BATCH_ROWS = 1000
_EXAMPLES = 3
_EXCERPT = 60


@dataclass(frozen=True)
class Validated:
    """A dataset that passed.

    Attributes:
        task: `classification`, `completion` or `text`.
        splits: the rows of `train`, `validation` and `test`, with their `tokens` as they are and
            `cut_tokens`, how many of those do not fit into `data.max_length`.
        findings: one line for each thing found in a row: `split`, `file`, `row`, `check`, the
            user's `column`, `value` and `reason`, and `dropped`, whether the row was left out.
        total_rows: rows in the files.
    """

    task: str
    splits: dict[str, pd.DataFrame]
    findings: pd.DataFrame
    total_rows: int

    @property
    def rejected(self) -> pd.DataFrame:
        """The findings whose rows were left out."""
        dropped = self.findings[self.findings["dropped"]]
        return dropped[list(FINDING_COLUMNS)].reset_index(drop=True)

    def count(self, *checks: str) -> int:
        """Return in how many rows one of these checks found something."""
        found = self.findings[self.findings["check"].isin(checks)]
        return len(found[["split", "file", "row"]].drop_duplicates())


def validate(data: Data, encoder: TextEncoder) -> Validated:
    """Read, check and split the dataset that `data` describes.

    Raises:
        UserError: if it cannot be read, or if no policy makes it usable.
    """
    checker = _Checker(data, encoder)
    sources = read_splits(data)
    rows = pd.concat([frame.assign(split=split) for split, frame in sources.items()])
    rows = rows.reset_index(drop=True)
    total = len(rows)
    rows = checker.drop_invalid(rows)
    rows["key"] = rows[checker.input].map(content_key)
    if checker.answer is not None:
        rows[checker.answer] = rows[checker.answer].str.strip()
    if data.task == "classification":
        _require_consistent_labels(rows, data)
    rows = checker.drop_duplicates(rows)
    rows = checker.handle_leaks(rows)
    rows = _complete_splits(rows, data, set(sources))
    checker.report_conflicts(rows)
    checker.report_truncated(rows)
    splits = {
        name: rows[rows["split"] == name].drop(columns=["split", "key"]).reset_index(drop=True)
        for name in SPLITS
    }
    held_out = [name for name in ("validation", "test") if name not in sources]
    _require_usable_splits(splits, held_out, data)
    return Validated(data.task, splits, checker.findings(), total)


class _Checker:
    """One dataset's checks, each of which takes rows and returns those that are left."""

    def __init__(self, data: Data, encoder: TextEncoder) -> None:
        self.data = data
        self.encoder = encoder
        self.fields = FIELDS[data.task]
        self.input = self.fields[0]
        self.answer = self.fields[1] if len(self.fields) > 1 else None
        self.columns = columns_of(data)
        self._found: list[pd.DataFrame] = []

    def findings(self) -> pd.DataFrame:
        empty = pd.DataFrame(columns=[*FINDING_COLUMNS, "dropped"])
        found = pd.concat(self._found, ignore_index=True) if self._found else empty
        return found.astype({"dropped": bool})

    def drop_invalid(self, rows: pd.DataFrame) -> pd.DataFrame:
        failed = schemas.failures(rows, self.fields)
        valid = rows.drop(index=failed["index"].unique())
        valid = valid.drop(columns=[f"{field}_kind" for field in self.fields])
        valid = valid.join(_token_counts(valid, self.data, self.encoder))
        no_room = valid[valid.pop("room") < 1]
        if self.answer is not None and len(no_room):
            reason = f"leaves no room for {self.input} within data.max_length"
            reason += f" = {self.data.max_length}"
            more = no_room.reset_index().rename(columns={self.answer: "value"})
            more = more.assign(check="room", field=self.answer, reason=reason)
            failed = pd.concat([failed, more[list(schemas.FAILURE_COLUMNS)]], ignore_index=True)
            valid = valid.drop(index=no_room.index)
        invalid = rows.loc[failed["index"]].reset_index(drop=True)
        found = invalid[["split", "file", "row"]].assign(
            check=failed["check"],
            column=failed["field"].map(self.columns),
            value=failed["value"],
            reason=failed["reason"],
            dropped=True,
        )
        self._add(found)
        self._apply_policy(found, failed["index"].nunique(), len(rows))
        if valid.empty:
            raise UserError(f"{self.data.train}: not one of {len(rows)} rows is valid")
        return valid

    def _apply_policy(self, found: pd.DataFrame, invalid: int, total: int) -> None:
        if not invalid:
            return
        allowed = self.data.max_invalid_fraction
        if self.data.on_invalid == "error":
            policy = "data.on_invalid is error; mend them, or set it to drop"
        elif invalid > allowed * total:
            policy = (
                f"more than data.max_invalid_fraction = {allowed:g} allows to drop; mend them, "
                "or raise it"
            )
        else:
            return
        problems = (
            f"{_place(row)}: {row.column} {row.reason}{_shown(row.value)}"
            for row in found.head(_EXAMPLES).itertuples()
        )
        more = f"; and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else ""
        raise UserError(
            f"invalid rows: {invalid} of {total}, {policy}: {'; '.join(problems)}{more}"
        )

    def drop_duplicates(self, rows: pd.DataFrame) -> pd.DataFrame:
        same = ["split", "key"] + ([self.answer] if self.answer else [])
        repeated = rows.duplicated(same)
        if repeated.any():
            first = rows[~repeated].set_index(same)
            copies = rows[repeated]
            originals = first.loc[pd.MultiIndex.from_frame(copies[same])]
            reason = _like("is the same as", originals)
            self._record(copies, "duplicate", self.input, reason, dropped=True)
        return rows[~repeated]

    def handle_leaks(self, rows: pd.DataFrame) -> pd.DataFrame:
        """A text belongs to the last of test, validation and train that has it."""
        owners = rows.assign(rank=rows["split"].map(SPLITS.index)).sort_values(
            "rank", kind="stable"
        )
        owners = owners.drop_duplicates("key", keep="last").set_index("key")
        owners = owners.loc[rows["key"]].set_axis(rows.index)
        leaked = owners["split"] != rows["split"]
        if not leaked.any():
            return rows
        copies, originals = rows[leaked], owners[leaked]
        pairs = (copies["split"] + " and " + originals["split"]).value_counts(sort=False)
        if self.data.on_leak == "error":
            counts = ", ".join(f"{count} in {pair}" for pair, count in pairs.items())
            copy, original = next(copies.itertuples()), next(originals.itertuples())
            text = _shown(getattr(copy, self.input))
            raise UserError(
                f"some texts are in two splits ({counts}), for example {_place(copy)} and "
                f"{_place(original)}{text}; data.on_leak is error: mend them, or set it to drop "
                "to keep each in the later split only"
            )
        dropped = self.data.on_leak == "drop"
        reason = _like("is the same as", originals)
        self._record(copies, "leak", self.input, reason, dropped=dropped)
        return rows[~leaked] if dropped else rows

    def report_conflicts(self, rows: pd.DataFrame) -> None:
        """The same text with different answers teaches a model to guess; only a person can tell."""
        if self.answer is None:
            return
        answers = rows.groupby("key")[self.answer].transform("nunique")
        conflicting = rows[answers > 1]
        if conflicting.empty:
            return
        known = conflicting.groupby("key")[self.answer].unique()
        reason = [
            f"has {len(known[key])} different answers: {_list(known[key], _EXAMPLES)}"
            for key in conflicting["key"]
        ]
        self._record(conflicting, "conflict", self.input, reason, dropped=False)

    def report_truncated(self, rows: pd.DataFrame) -> None:
        cut = rows[rows["cut_tokens"] > 0].sort_values("cut_tokens", ascending=False, kind="stable")
        if len(cut):
            reason = "loses " + cut["cut_tokens"].astype(str) + " tokens at its end"
            self._record(cut, "truncated", self.input, reason, dropped=False)

    def _record(
        self,
        rows: pd.DataFrame,
        check: str,
        field: str,
        reason: pd.Series | Sequence[str],
        dropped: bool,
    ) -> None:
        found = rows[["split", "file", "row"]].assign(
            check=check,
            column=self.columns[field],
            value=rows[field],
            reason=reason,
            dropped=dropped,
        )
        self._add(found)

    def _add(self, found: pd.DataFrame) -> None:
        if len(found):
            self._found.append(found)


def _token_counts(rows: pd.DataFrame, data: Data, encoder: TextEncoder) -> pd.DataFrame:
    """Count tokens without keeping them.

    Returns:
        `tokens`, all that the row would take; `cut_tokens`, how many of its text do not fit into
        `data.max_length` (what `PromptEncoder.example` cuts); and `room`, the tokens that are left
        for the text.
    """
    if data.task == "text":
        # Documents are packed end to end and none of them is cut; prefix, text, end-of-text token.
        texts = pd.Series(list(_lengths(rows["text"], encoder)), rows.index, dtype="int64")
        tokens = texts + len(encoder.prefix_ids) + 1
        return pd.DataFrame({"tokens": tokens, "cut_tokens": 0, "room": data.max_length})
    first, second = FIELDS[data.task]
    texts = pd.Series(list(_lengths(rows[first].str.strip(), encoder)), rows.index, dtype="int64")
    prompts = PromptEncoder(encoder, data.prompt_template, data.max_length)
    distinct = {answer: len(prompts.completion_ids(answer)) for answer in rows[second].unique()}
    template = len(prompts.prompt("", reserve=0).ids)
    fixed = template + rows[second].map(distinct).astype("int64")
    room = data.max_length - fixed
    cut = (texts - room).clip(lower=0)
    return pd.DataFrame({"tokens": texts + fixed, "cut_tokens": cut, "room": room})


def _lengths(texts: pd.Series, encoder: TextEncoder) -> Iterator[int]:
    for start in range(0, len(texts), _BATCH_ROWS):
        batch = texts.iloc[start : start + _BATCH_ROWS].tolist()
        yield from map(len, encoder.encode_batch(batch))


def _require_consistent_labels(rows: pd.DataFrame, data: Data) -> None:
    counts = rows["label"].value_counts()
    alike: dict[str, list[str]] = {}
    for label in counts.index:  # the most frequent first
        alike.setdefault(" ".join(label.casefold().split()), []).append(label)
    problems = []
    for labels in alike.values():
        if len(labels) > 1:
            listed = " and ".join(f"{label!r} ({counts[label]} rows)" for label in labels)
            problems.append(
                f"labels {listed} in column {data.label_column} differ only in case or spaces; "
                f"write {labels[0]!r} for all"
            )
    if problems:
        raise UserError("\n".join(problems))
    labels = rows.loc[rows["split"] == "train", "label"].unique()
    if len(labels) == 1:
        raise UserError(
            f"{data.train} has one label only, {labels[0]!r} in column {data.label_column}; "
            "classification needs at least two"
        )


def _complete_splits(rows: pd.DataFrame, data: Data, present: set[str]) -> pd.DataFrame:
    """Hold validation and test out of train where they have no file of their own."""
    sizes = {"test": data.test_size, "validation": data.validation_size}
    shares = {split: size for split, size in sizes.items() if split not in present}
    if not shares:
        return rows
    train = rows[rows["split"] == "train"]
    labels = train["label"] if data.task == "classification" else None
    parts = hold_out(train, shares, train["key"], labels)
    held_out = pd.concat([part.assign(split=split) for split, part in parts.items()])
    return pd.concat([held_out, rows[rows["split"] != "train"]])


def _require_usable_splits(
    splits: dict[str, pd.DataFrame], held_out: Sequence[str], data: Data
) -> None:
    needed = 2 if data.task == "classification" else 1
    problems = []
    too_few = []
    for name, rows in splits.items():
        count = rows["label"].nunique() if data.task == "classification" else min(len(rows), 1)
        if count >= needed:
            continue
        if name in held_out:
            too_few.append(name)
        elif rows.empty:
            problems.append(f"the {name} split has no rows left; add rows to data.{name}")
        else:
            label = rows["label"].iloc[0]
            problems.append(f"the {name} split has one label only, {label!r}; it needs two")
    if too_few:
        what = "texts" if needed == 1 else "texts of at least two labels"
        problems.append(
            f"{data.train} has too few {what} to hold out {' and '.join(too_few)}; add rows, or "
            f"name files in {' and '.join(f'data.{name}' for name in too_few)}"
        )
    if data.task == "classification":
        known = set(splits["train"]["label"])
        for name in ("validation", "test"):
            unseen = sorted(set(splits[name]["label"]) - known)
            if unseen:
                problems.append(
                    f"labels in {name} that train never shows: {_list(unseen, 10)}; add rows "
                    f"with them to train or remove them from {name}"
                )
    if problems:
        raise UserError("\n".join(problems))


def _like(words: str, originals: pd.DataFrame) -> list[str]:
    return [
        f"{words} {file} row {row}"
        for file, row in zip(originals["file"], originals["row"], strict=True)
    ]


def _list(values: Sequence[str], limit: int) -> str:
    listed = ", ".join(excerpt(repr(value)) for value in list(values)[:limit])
    return f"{listed} and {len(values) - limit} more" if len(values) > limit else listed


def _place(row: object) -> str:
    return f"{row.file} row {row.row}"  # type: ignore[attr-defined]


def _shown(value: object) -> str:
    text = excerpt(value) if isinstance(value, str) else ""
    return f" ({text!r})" if text else ""


def excerpt(text: str, length: int = _EXCERPT) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
