"""The passes over a dataset: read and check, compare, write."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from gptj8.dataset.prepared.dataset import SPLITS, PreparedWriter
from gptj8.dataset.validation import near_duplicates, policies, relations
from gptj8.dataset.validation.file_scan import scan_files
from gptj8.dataset.validation.mixture import Mixture
from gptj8.dataset.validation.parallel import ordered_map
from gptj8.dataset.validation.row_findings import RowFindings
from gptj8.dataset.validation.row_store import RowStore
from gptj8.dataset.validation.running_text import Parts, follows, with_borders
from gptj8.dataset.validation.scan import Scanner
from gptj8.dataset.validation.validated import Validated
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import listed
from gptj8.runtime.progress import each, progress

_EXAMPLES = 3
_CHUNK = 8192  # rows hashed per call


class Passes:
    """The passes over one dataset, and their state.

    Attributes:
        parts: the parts of documents, if the rows are running text.
        mixture: the weights of files, if there are any.
        emptied: the splits that leaks leave without rows.
        split: the split of each row, as an index into `SPLITS`.
        kept: whether each row is kept.
        label: the label of each row, as an index into `label_names`.
    """

    def __init__(self, data: Data, scanner: Scanner, validated: Validated, store: RowStore) -> None:
        self.data = data
        self.scanner = scanner
        self.shape = scanner.shape
        self.validated = validated
        self.store = store
        self.label_names: list[str] = []
        self.split = self.label = np.empty(0, dtype=np.uint8)
        self.kept = np.empty(0, dtype=bool)
        self.parts: Parts | None = None
        self.mixture: Mixture | None = None
        self.emptied: list[str] = []
        self.row_findings = RowFindings(store, scanner.shape, validated.findings)
        if data.train_weights:
            files = validated.files["train"]
            self.mixture = Mixture(data.train_weights, files, Path(data.train))

    def run(self, directory: Path) -> None:
        self._scan()
        findings = self.validated.findings
        invalid, total = self.validated.invalid_rows, self.validated.total_rows
        if not self.store.size:
            nothing = policies.nothing_valid(self.data, findings, total.total())
            self.validated.problems.append(nothing)
            return
        self.validated.problems += policies.invalid_rows(self.data, findings, invalid, total)
        self.split = self.store.fact("split")
        self.kept = np.ones(self.store.size, dtype=bool)
        if self.data.task == "text":
            self.parts = Parts(self.store.fact("follows"))
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
        numbers: dict[str, int] = {}
        total = sum(path.stat().st_size for paths in validated.files.values() for path in paths)
        previous: tuple[str, int] | None = None
        with progress(total, "read", "bytes") as advance:
            empty: dict[Path, str] = {}
            for batch in scan_files(
                self.scanner, validated.files, self.data.engine, advance, empty
            ):
                split = split_of[batch.file]
                validated.total_rows[split] += batch.total
                validated.invalid_rows[split] += batch.invalid
                validated.rewritten_rows += batch.rewritten
                validated.findings.add(batch.findings.assign(split=split))
                size = batch.rows.num_rows
                if self.data.task == "text" and size:
                    places = batch.rows.select(["file", "row", "next_row"]).to_pandas()
                    batch.facts["follows"] = follows(places, previous)
                    previous = places["file"].iloc[-1], int(places["next_row"].iloc[-1])
                if self.mixture:
                    files = batch.rows.column("file").to_pylist()
                    batch.facts["pattern"] = self.mixture.patterns(files)
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
        equal = relations.equal_texts(high, low, np.flatnonzero(self._is_compared()))
        found = relations.duplicates(equal, self.split, self.store.fact("answer"))
        if self.parts:
            found = self.parts.duplicates(found, self._is_compared())
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
        is_compared = self.kept & self._is_compared() & (self.store.normalized_lengths() > 0)
        rows = np.flatnonzero(is_compared)
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
        if self.parts:
            left &= ~self.parts.are_parts[pairs].any(axis=1)
        drop = self.data.on_near_duplicate == "drop"
        found = relations.near_duplicates(pairs[left], alike[left], self.split, drop)
        self._report_relation("near_duplicate", found, "is nearly the same as", drop)
        return pairs

    def _is_compared(self) -> np.ndarray:
        """Return whether each row is compared with others; brief parts of documents are not."""
        if self.parts is None:
            return np.ones(self.store.size, dtype=bool)
        return ~(self.parts.are_parts & self.store.fact("brief"))

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
        before = np.bincount(self.split[self.kept], minlength=len(SPLITS))
        self._report_relation(check, found, words, drop=policy == "drop")
        if policy == "warn":
            return
        leaking = np.bincount(self.split[found["index"]], minlength=len(SPLITS))
        for number, name in enumerate(SPLITS):
            if before[number] and before[number] == leaking[number]:
                owner = SPLITS[int(self.split[found["other"]].max())]
                problem = policies.same_rows(self.data, name, owner, int(before[number]))
                self.validated.problems.insert(0, problem)
                self.emptied.append(name)
        if policy == "drop" or self.emptied:
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
        if self.parts:
            equal, pairs = equal.head(0), self.parts.edges(equal, pairs)
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
        copies = self._copies()
        borders = self.parts.borders(self.kept, self.split, copies) if self.parts else None
        encoder = self.scanner.encoder
        with (
            closing(prepared) as writer,
            progress(self.store.size, "write", "rows") as advance,
        ):
            for start, batch in self.store.batches():
                end = start + batch.num_rows
                self._report_truncated(start, batch)
                if borders:
                    begins, ends = (border[start:end] for border in borders)
                    batch = with_borders(batch, begins, ends, encoder.prefix_ids, encoder.eos_id)
                for number, name in enumerate(SPLITS):
                    chosen = np.flatnonzero(
                        self.kept[start:end] & (self.split[start:end] == number)
                    )
                    if copies is not None and not number:
                        chosen = np.repeat(chosen, copies[start:end][chosen])
                    rows = batch.take(pa.array(chosen))
                    writer.add(name, rows)
                    self._count(name, rows)
                    if names:
                        found = np.bincount(self.label[start:end][chosen], minlength=len(names))
                        validated.labels[name].update(
                            {names[i]: int(found[i]) for i in np.flatnonzero(found)}
                        )
                advance(batch.num_rows)
            if not validated.problems:
                writer.finish(names)
            validated.rows, validated.examples = writer.rows, writer.examples

    def _copies(self) -> np.ndarray | None:
        """Return how often each row of train is used; None: once."""
        if self.mixture is None:
            return None
        patterns, high = self.store.fact("pattern"), self.store.fact("key_high")
        copies = self.mixture.copies(patterns, high)
        in_train = self.kept & (self.split == 0)
        self.validated.notes += self.mixture.describe(patterns[in_train], copies[in_train])
        return copies

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
        if self.emptied:
            return  # the other problems follow from that
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

    def _report(self, check: str, rows: np.ndarray, reasons: Sequence[str], field: str) -> None:
        self.row_findings.add(check, rows, self.split, reasons, field)

    def _report_relation(self, check: str, found: pd.DataFrame, words: str, drop: bool) -> None:
        self.row_findings.add_relation(check, found, self.split, words, drop)
        if drop:
            self.kept[found["index"]] = False
