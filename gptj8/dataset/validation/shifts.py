"""Whether the splits of a dataset are alike: a model is measured on what it did not learn, and that
should differ from what it learned in the rows and not in their kind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import chdtrc, kolmogorov  # scipy.stats takes half a second to import

NOTABLE = 0.1
"""Distances below this are of no interest, however significant: of large splits all are."""
_SIGNIFICANT = 0.001


class Shift(NamedTuple):
    """How far apart two distributions are.

    Attributes:
        distance: 0 (equal) to 1 (nothing in common).
        p_value: of a distance as large by chance alone.
    """

    distance: float
    p_value: float

    @property
    def notable(self) -> bool:
        """Whether a person should know."""
        return self.distance >= NOTABLE and self.p_value < _SIGNIFICANT


def length_shift(one: np.ndarray, other: np.ndarray) -> Shift:
    """Compare two distributions of lengths by Kolmogorov and Smirnov's distance.

    Args:
        one, other: how many texts have each length, from 0 on; neither is empty.

    Returns:
        The largest distance of the cumulative distributions, and its asymptotic p-value, which ties
        make a little too large.
    """
    size = max(len(one), len(other))
    first, second = (np.pad(counts, (0, size - len(counts))) for counts in (one, other))
    n, m = first.sum(), second.sum()
    distance = float(np.abs(np.cumsum(first) / n - np.cumsum(second) / m).max())
    return Shift(distance, float(kolmogorov(np.sqrt(n * m / (n + m)) * distance)))


def label_shift(one: np.ndarray, other: np.ndarray) -> Shift:
    """Compare two distributions of labels.

    Args:
        one, other: how many rows have each label, in the same order; neither is empty.

    Returns:
        Half the sum of the differences of all shares (total variation), and the p-value of a
        chi-squared test of homogeneity.
    """
    used = (one + other) > 0
    first, second = one[used], other[used]
    distance = float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)
    if len(first) < 2:
        return Shift(distance, 1.0)
    observed = np.stack([first, second])
    expected = observed.sum(1, keepdims=True) * observed.sum(0) / observed.sum()
    differences = np.abs(observed - expected)
    if len(first) == 2:  # Yates' correction: counts are whole, chi-squared is continuous
        differences -= np.minimum(0.5, differences)
    statistic = (differences**2 / expected).sum()
    return Shift(distance, float(chdtrc(len(first) - 1, statistic)))
