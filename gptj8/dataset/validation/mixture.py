"""Use the training rows of some files more or less often than those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted, listed


class Mixture:
    """Weights of files: a row is used as often as its file's weight says.

    The fraction of a weight selects rows by the hash of their text, so the choice depends on no
    order and no seed: with 0.5, half of the rows are used.

    Attributes:
        weights: pattern -> weight, from the params.
    """

    def __init__(
        self, weights: Mapping[str, float], files: Sequence[Path], directory: Path
    ) -> None:
        self.weights = dict(weights)
        names = {path: _name_in(path, directory) for path in files}
        self._pattern_of = {
            path.as_posix(): number
            for path, name in names.items()
            for number, pattern in enumerate(self.weights, 1)
            if fnmatchcase(name, pattern)
        }  # a later pattern wins
        for pattern in self.weights:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise UserError(
                    f"data.train_weights: no training file matches {pattern}; the files: "
                    f"{listed(sorted(names.values()), 10)}"
                )
        self._values = np.array([1.0, *self.weights.values()])

    def patterns(self, files: Sequence[str]) -> np.ndarray:
        """Return the number of the pattern of each row's file, (rows,) uint8; 0: none."""
        return np.fromiter(
            (self._pattern_of.get(file, 0) for file in files), dtype=np.uint8, count=len(files)
        )

    def copies(self, patterns: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return how often each row is used, (rows,) int32.

        Args:
            patterns: (rows,) from `patterns`.
            high: (rows,) uint64, hashes of the texts.
        """
        weights = self._values[patterns]
        whole = np.floor(weights)
        # Other bits than the ones that hold rows out.
        position = (high & np.uint64(0xFFFFFFFF)) / float(1 << 32)
        return (whole + (position < weights - whole)).astype(np.int32)

    def describe(self, patterns: np.ndarray, copies: np.ndarray) -> list[str]:
        """Return a line for each pattern: its training rows, and how often they are used."""
        size = len(self._values)
        rows = np.bincount(patterns, minlength=size)
        used = np.bincount(patterns, copies, minlength=size)
        return [
            f"{pattern}: {counted(int(rows[number]), 'training row')} used {int(used[number]):,} "
            f"times (weight {weight:g})"
            for number, (pattern, weight) in enumerate(self.weights.items(), 1)
        ]


def _name_in(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix() if directory in path.parents else path.name
