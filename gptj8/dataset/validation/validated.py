"""The result of validating a dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.validation.findings import Findings


@dataclass
class Validated:
    """The result of validating a dataset.

    Attributes:
        task: `classification`, `completion` or `text`.
        files: the files that were read, by split.
        findings: all findings.
        ignored: files in the directories that were not read or have no rows.
        notes: how the files were read, where that was found out, and what was used of them.
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
    notes: list[str] = field(default_factory=list)
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
