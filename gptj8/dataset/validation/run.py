"""Validate a dataset: find data that harms fine-tuning, and apply the policies for it.

`validate` goes from params to a prepared dataset in three passes. The first reads, checks and
tokenizes rows in batches (`gptj8.dataset.validation.scan`) and keeps a few bytes per row. The
second uses those bytes to compare rows: duplicates within a split, leaks between splits,
near-duplicates, and texts with different answers (`gptj8.dataset.validation.relations`). The third
writes the remaining rows. No row is dropped silently: each dropped row has a finding. What no
policy can fix is a problem, and all problems of a dataset are collected before it is rejected.

Memory is bounded by a few batches and about 60 bytes per row; see
`gptj8.dataset.validation.row_store`. All checks are exact, except that some near-duplicates are
missed; see `gptj8.dataset.validation.near_duplicates`. Two texts are equal if they have the same
`gptj8.dataset.readers.sources.content_key`, which ignores whitespace and Unicode form.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from gptj8.dataset.prepared.dataset import SPLITS, PreparedWriter
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.formats import require_optional_columns
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.dataset.readers.sources import find_sources
from gptj8.dataset.validation import near_duplicates, policies, relations
from gptj8.dataset.validation.findings import Findings, copy_dropped
from gptj8.dataset.validation.parallel import ordered_map
from gptj8.dataset.validation.row_store import RowStore
from gptj8.dataset.validation.scan import Scanner, scan_files
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import listed
from gptj8.runtime.progress import each, progress

FINDINGS_FILE = "findings.parquet"
REJECTED_FILE = "rejected.parquet"

_EXAMPLES = 3
_CHUNK = 8192  # rows hashed or reported per call


@dataclass
class Validated:
    """The result of validating a dataset.

    Attributes:
        task: `classification`, `completion` or `text`.
        files: the files that were read, by split.
        findings: all findings.
        ignored: files in the directories that were not read or have no rows.
        problems: why the dataset cannot be used, one line per problem; empty if it can be used.
        total_rows, invalid_rows: the number of rows, and of invalid rows, in the files of each
            split.
        rewritten_rows: the number of conversations whose earlier answers the chat template
            rewrites; each answer is then an example of its own.
        rows: the number of rows kept, per split.
        examples: the number of training examples, per split that training reads.
        tokens: the number of tokens within max_length, per split.
        lengths: per split, the number of rows with 0, 1, 2 ... tokens before truncation.
        labels: the number of rows per label in each split; empty unless the task is classification.
        near_recall: the expected fraction, 0 to 1, of the pairs with a similarity equal to
            `near_duplicate_threshold` that are found; None if near-duplicates are not searched for.
        seconds: the time taken.
    """

    task: str
    files: dict[str, list[Path]]
    findings: Findings
    problems: list[str] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    rewritten_rows: int = 0
    total_rows: Counter[str] = field(default_factory=Counter)
    invalid_rows: Counter[str] = field(default_factory=Counter)
    rows: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    lengths: dict[str, np.ndarray] = field(
        default_factory=lambda: {name: np.zeros(1, dtype=np.int64) for name in SPLITS}
    )
    labels: dict[str, Counter[str]] = field(default_factory=lambda: {n: Counter() for n in SPLITS})
    near_recall: float | None = None
    seconds: float = 0.0


def validate(
    data: Data,
    encoder: TextEncoder,
    directory: str | Path,
) -> Validated:
    """Read, check and split the dataset that `data` describes, and write it for training.

    Args:
        data: the params.
        encoder: the model's tokenizer.
        directory: an empty directory for the findings and the prepared dataset, which is complete
            only if there are no problems. Temporary files need a few bytes per row.

    Raises:
        UserError: one line per file that cannot be read, or if no row is valid.
    """
    started = time.monotonic()
    sources = find_sources(data)
    shape = shape_of(data)
    files = [file for paths in sources.files.values() for file in paths]
    require_optional_columns(files, shape.expected)
    directory = Path(directory)
    scratch = directory / ".scratch"
    try:
        with (
            closing(Findings(directory / FINDINGS_FILE)) as findings,
            closing(RowStore(scratch)) as store,
        ):
            validated = Validated(data.task, sources.files, findings, ignored=sources.ignored)
            _Validation(data, encoder, validated, store).run(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    copy_dropped(directory / FINDINGS_FILE, directory / REJECTED_FILE)
    validated.seconds = time.monotonic() - started
    return validated


class _Validation:
    """The passes over one dataset, and their state.

    Attributes:
        split: the split of each row, as an index into `SPLITS`.
        kept: whether each row is kept.
        label: the label of each row, as an index into `label_names`.
    """

    def __init__(
        self, data: Data, encoder: TextEncoder, validated: Validated, store: RowStore
    ) -> None:
        self.data = data
        self.scanner = Scanner(data, encoder)
        self.shape = self.scanner.shape
        self.validated = validated
        self.store = store
        self.label_names: list[str] = []
        self.split = self.label = np.empty(0, dtype=np.uint8)
        self.kept = np.empty(0, dtype=bool)

    def run(self, directory: Path) -> None:
        self._scan()
        findings = self.validated.findings
        invalid, total = self.validated.invalid_rows, self.validated.total_rows
        if not self.store.size:
            raise UserError(policies.nothing_valid(self.data, findings, total.total()))
        self.validated.problems += policies.invalid_rows(self.data, findings, invalid, total)
        self.split = self.store.fact("split")
        self.kept = np.ones(self.store.size, dtype=bool)
        if self.data.task == "classification":
            self.label = self.store.fact("label")
            if self.data.labels is None:  # spellings in data.labels are intended
                self._check_label_spellings()
        equal = self._drop_equal()
        pairs = self._compare_near()
        equal = equal[self.kept[equal["index"]]]
        self._hold_out(equal, pairs)
        self._report_conflicts(equal)
        self._write(directory)
        self._check_splits()

    # --- pass 1 -----------------------------------------------------------------------------------

    def _scan(self) -> None:
        validated = self.validated
        split_of = {p.as_posix(): split for split, paths in validated.files.items() for p in paths}
        files = [path for paths in validated.files.values() for path in paths]
        numbers: dict[str, int] = {}
        total = sum(path.stat().st_size for path in files)
        with progress(total, "read", "bytes") as advance:
            empty: dict[Path, str] = {}
            for batch in scan_files(self.scanner, files, self.data.engine, advance, empty):
                split = split_of[batch.file]
                validated.total_rows[split] += batch.total
                validated.invalid_rows[split] += batch.invalid
                validated.rewritten_rows += batch.rewritten
                validated.findings.add(batch.findings.assign(split=split))
                size = batch.rows.num_rows
                facts = batch.facts | {"split": np.full(size, SPLITS.index(split), np.uint8)}
                if self.data.task == "classification":
                    labels = batch.rows.column("label").to_pylist()
                    found = (numbers.setdefault(label, len(numbers)) for label in labels)
                    facts["label"] = np.fromiter(found, dtype=np.int32, count=size)
                self.store.append(batch.rows, facts, batch.normalized)
        self.store.finish()
        self.label_names = list(numbers)
        # A file without rows is an error only if all files of its split are empty.
        empty_splits = [paths for paths in validated.files.values() if empty.keys() >= set(paths)]
        if empty_splits:
            raise UserError("\n".join(empty[path] for paths in empty_splits for path in paths))
        validated.ignored += empty

    # --- pass 2 -----------------------------------------------------------------------------------

    def _check_label_spellings(self) -> None:
        counts = np.bincount(self.label, minlength=len(self.label_names)).tolist()
        for numbers in policies.spelled_alike(self.label_names, counts):
            names = [self.label_names[number] for number in numbers]
            rows_of = [counts[number] for number in numbers]
            self.validated.problems.append(policies.label_spellings(self.data, names, rows_of))
            rows = np.flatnonzero(np.isin(self.label, numbers[1:]))
            reason = f"differs only in spelling from {names[0]!r}, which more rows have"
            self._report("label_case", rows, [reason] * len(rows), field="label")

    def _drop_equal(self) -> pd.DataFrame:
        """Report equal texts, drop duplicates and leaks, and return the remaining equal texts."""
        high, low = self.store.fact("key_high"), self.store.fact("key_low")
        equal = relations.equal_texts(high, low, np.arange(self.store.size))
        found = relations.duplicates(equal, self.split, self.store.fact("answer"))
        self._report_relation("duplicate", found, "is the same as", drop=True)
        equal = equal[self.kept[equal["index"]]]
        found = relations.leaks(equal, self.split)
        self._handle_leaks("leak", found, "is the same as")
        return equal[self.kept[equal["index"]]]

    def _compare_near(self) -> np.ndarray:
        """Find near-duplicates and return the pairs.

        The pairs include rows that are dropped now, because two rows that are similar to a dropped
        row still belong together.
        """
        threshold = self.data.near_duplicate_threshold
        if threshold is None:
            return np.empty((0, 2), dtype=np.int64)
        # A text that is empty after normalization cannot be compared.
        rows = np.flatnonzero(self.kept & (self.store.normalized_lengths() > 0))
        bands = self._hash_bands(*near_duplicates.banding(threshold, len(rows)))
        self.validated.near_recall = near_duplicates.expected_recall(threshold, len(rows))
        pairs, alike = near_duplicates.find_similar(
            (self.store.fact(b)[rows] for b in each(bands, len(bands), "match", "bands")),
            self.split[rows],
            lambda index: self.store.normalized(int(rows[index])),
            threshold,
        )
        # Equal texts are already reported as duplicates, leaks or conflicts.
        high = self.store.fact("key_high")[rows]
        differ = high[pairs[:, 0]] != high[pairs[:, 1]]
        pairs, alike = rows[pairs[differ]], alike[differ]
        found = relations.near_leaks(pairs, alike, self.split)
        self._handle_leaks("near_leak", found, "is nearly the same as")
        left = self.kept[pairs].all(axis=1)
        drop = self.data.on_near_duplicate == "drop"
        found = relations.near_duplicates(pairs[left], alike[left], self.split, drop)
        self._report_relation("near_duplicate", found, "is nearly the same as", drop)
        return pairs

    def _hash_bands(self, bands: int, width: int) -> list[str]:
        """Store the band hashes of all rows as facts; return the names of the facts."""
        size = self.store.size
        starts = range(0, size, _CHUNK)
        texts = (self.store.normalized_between(s, min(s + _CHUNK, size)) for s in starts)
        names = [f"band{number}" for number in range(bands)]
        with progress(size, "compare", "rows") as advance:
            hash_texts = functools.partial(near_duplicates.band_hashes, bands=bands, width=width)
            for hashes in ordered_map(hash_texts, texts):
                self.store.add_facts(dict(zip(names, hashes, strict=True)))
                advance(hashes.shape[1])
        self.store.finish()
        return names

    def _handle_leaks(self, check: str, found: pd.DataFrame, words: str) -> None:
        if found.empty:
            return
        policy = self.data.on_leak
        self._report_relation(check, found, words, drop=policy == "drop")
        if policy != "error":
            return
        owners = self.split[found["other"]].tolist()
        pairs = Counter(zip(self.split[found["index"]].tolist(), owners, strict=True))
        example = next(self.validated.findings.examples[check].itertuples())
        self.validated.problems.append(policies.leaks(check, pairs, example))

    def _hold_out(self, equal: pd.DataFrame, pairs: np.ndarray) -> None:
        """Hold validation and test out of train if they have no files of their own."""
        sizes = {"test": self.data.test_size, "validation": self.data.validation_size}
        shares = {
            SPLITS.index(name): share
            for name, share in sizes.items()
            if name not in self.validated.files
        }
        if not shares:
            return
        rows = np.flatnonzero(self.kept & (self.split == 0))
        cluster = relations.clusters(self.store.size, equal, pairs)[rows]
        high = self.store.fact("key_high")[rows]
        label = self.label[rows] if self.data.task == "classification" else None
        self.split[rows] = relations.hold_out(high, cluster, label, shares)

    def _report_conflicts(self, equal: pd.DataFrame) -> None:
        """Report texts with different answers; the user has to decide which answer is right."""
        answer = self.shape.answer
        if answer is None:
            return
        found = relations.conflicts(equal, self.store.fact("answer"))
        if found.empty:
            return
        shown = found.groupby("group").head(_EXAMPLES + 1)
        texts = self.store.rows(shown["index"].to_numpy(), [answer])[answer]
        known = texts.groupby(shown["group"].to_numpy()).unique()
        reasons = [
            f"has {row.answers} different answers: {listed(known[row.group], _EXAMPLES)}"
            for row in found.itertuples()
        ]
        self._report("conflict", found["index"].to_numpy(), reasons, field=self.shape.input)

    # --- pass 3 -----------------------------------------------------------------------------------

    def _write(self, directory: Path) -> None:
        validated = self.validated
        names = self.label_names
        prepared = PreparedWriter(
            directory,
            self.data.task,
            self.shape.prompt_template,
            self.data.max_length,
            self.scanner.chat if self.shape.is_conversation else None,
        )
        with (
            closing(prepared) as writer,
            progress(self.store.size, "write", "rows") as advance,
        ):
            for start, batch in self.store.batches():
                end = start + batch.num_rows
                self._report_truncated(start, batch)
                for number, name in enumerate(SPLITS):
                    inside = self.kept[start:end] & (self.split[start:end] == number)
                    rows = batch.filter(pa.array(inside))
                    writer.add(name, rows)
                    self._count(name, rows)
                    if names:
                        found = np.bincount(self.label[start:end][inside], minlength=len(names))
                        validated.labels[name].update(
                            {names[i]: int(found[i]) for i in np.flatnonzero(found)}
                        )
                advance(batch.num_rows)
            if not validated.problems:
                writer.finish(names)
            validated.rows, validated.examples = writer.rows, writer.examples

    def _count(self, split: str, rows: pa.RecordBatch) -> None:
        tokens = rows.column("tokens").to_numpy()
        cut = rows.column("cut_tokens").to_numpy()
        self.validated.tokens[split] += int((tokens - cut).sum())
        known = self.validated.lengths[split]
        counts = np.bincount(tokens, minlength=len(known))
        counts[: len(known)] += known
        self.validated.lengths[split] = counts

    def _report_truncated(self, start: int, batch: pa.RecordBatch) -> None:
        cut = batch.column("cut_tokens").to_numpy()
        rows = np.flatnonzero((cut > 0) & self.kept[start : start + len(cut)])
        if len(rows):
            reasons = [f"is truncated by {count} tokens" for count in cut[rows].tolist()]
            if self.shape.is_conversation:
                reasons = batch.column("cut").take(pa.array(rows)).to_pylist()
            self._report("truncated", start + rows, reasons, field=self.shape.input)

    def _check_splits(self) -> None:
        validated = self.validated
        labels = validated.labels if self.data.task == "classification" else None
        files = frozenset(validated.files)
        validated.problems += policies.splits(self.data, validated.rows, labels, files)
        if labels is None or len(self.label_names) < 2:
            return
        validated.problems += policies.missing_labels(self.data, labels["train"])
        for number, name in enumerate(SPLITS[1:], 1):
            unseen = sorted(set(labels[name]) - set(labels["train"]))
            if not unseen:
                continue
            validated.problems.append(policies.unseen_labels(name, unseen))
            numbers = [self.label_names.index(label) for label in unseen]
            rows = np.flatnonzero(self.kept & (self.split == number) & np.isin(self.label, numbers))
            self._report("unseen_label", rows, ["does not occur in train"] * len(rows), "label")

    # --- findings ---------------------------------------------------------------------------------

    def _report_relation(self, check: str, found: pd.DataFrame, words: str, drop: bool) -> None:
        for start in range(0, len(found), _CHUNK):
            part = found.iloc[start : start + _CHUNK]
            others = self.store.rows(part["other"].to_numpy(), [self.shape.input, "file", "row"])
            reasons = [
                f"{words} {file} row {row}"
                for file, row in zip(others["file"], others["row"], strict=True)
            ]
            if "similarity" in part:
                alike = part["similarity"]
                reasons = [f"{r} (similarity {s:.2f})" for r, s in zip(reasons, alike, strict=True)]
            others = others.rename(columns={self.shape.input: "value"}).add_prefix("other_")
            rows = part["index"].to_numpy()
            self._report(check, rows, reasons, self.shape.input, drop, others)
        if drop:
            self.kept[found["index"]] = False

    def _report(
        self,
        check: str,
        rows: np.ndarray,
        reasons: Sequence[str],
        field: str,
        drop: bool = False,
        others: pd.DataFrame | None = None,
    ) -> None:
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            found = self.store.rows(part, [field, "file", "row"])
            found = found.rename(columns={field: "value"}).assign(
                split=[SPLITS[number] for number in self.split[part]],
                check=check,
                column=self.shape.column_of(field),
                reason=list(reasons[start : start + _CHUNK]),
                dropped=drop,
            )
            if others is not None:
                found = found.join(others.iloc[start : start + _CHUNK].reset_index(drop=True))
            self.validated.findings.add(found)
