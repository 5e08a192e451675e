"""Findings of stored rows, with their texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.readers.row_shapes import Shape
from gptj8.dataset.validation.findings import Findings
from gptj8.dataset.validation.row_store import RowStore

_CHUNK = 8192  # rows per call


class RowFindings:
    """Add findings of rows by their index in a store."""

    def __init__(self, store: RowStore, shape: Shape, findings: Findings) -> None:
        self.store = store
        self.shape = shape
        self.findings = findings

    def add(
        self,
        check: str,
        rows: np.ndarray,
        split: np.ndarray,
        reasons: Sequence[str],
        field: str,
        drop: bool = False,
        others: pd.DataFrame | None = None,
    ) -> None:
        """Add findings of one check.

        Args:
            check: a name in `gptj8.dataset.validation.checks`.
            rows: (findings,) the indices of the rows.
            split: (all rows,) the split of each row, as an index into `SPLITS`.
            reasons: one per row.
            field: the field that has the finding.
            drop: whether the rows are dropped.
            others: the related row of each: `other_file`, `other_row` and `other_value`.
        """
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            found = self.store.rows(part, [field, "file", "row"])
            found = found.rename(columns={field: "value"}).assign(
                split=[SPLITS[number] for number in split[part]],
                check=check,
                column=self.shape.column_of(field),
                reason=list(reasons[start : start + _CHUNK]),
                dropped=drop,
            )
            if others is not None:
                found = found.join(others.iloc[start : start + _CHUNK].reset_index(drop=True))
            self.findings.add(found)

    def add_relation(
        self, check: str, found: pd.DataFrame, split: np.ndarray, words: str, drop: bool
    ) -> None:
        """Add findings of rows that are related to others.

        Args:
            check: a name in `gptj8.dataset.validation.checks`.
            found: `index`, `other` and, of near-duplicates, `similarity`.
            split: (all rows,) the split of each row, as an index into `SPLITS`.
            words: how a row is related to the other.
            drop: whether the rows are dropped.
        """
        field = self.shape.input
        for start in range(0, len(found), _CHUNK):
            part = found.iloc[start : start + _CHUNK]
            others = self.store.rows(part["other"].to_numpy(), [field, "file", "row"])
            places = zip(others["file"], others["row"], strict=True)
            reasons = [f"{words} {file} row {row}" for file, row in places]
            if "similarity" in part:
                alike = part["similarity"]
                reasons = [f"{r} (similarity {s:.2f})" for r, s in zip(reasons, alike, strict=True)]
            others = others.rename(columns={field: "value"}).add_prefix("other_")
            self.add(check, part["index"].to_numpy(), split, reasons, field, drop, others)
