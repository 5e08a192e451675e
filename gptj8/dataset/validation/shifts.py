"""Measure whether the splits of a dataset have similar distributions.

The rows of validation and test should differ from those of train, but not their distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import kolmogorov

NOTABLE = 0.1
"""Smaller distances are ignored: in large splits even tiny distances are significant."""
_SIGNIFICANT = 0.001


class Shift(NamedTuple):
    """The distance between two distributions.

    Attributes:
        distance: 0 (identical) to 1 (no overlap).
        p_value: the probability of a distance at least this large by chance.
    """

    distance: float
    p_value: float

    @property
    def notable(self) -> bool:
        """Whether the shift is large and significant enough to report."""
        return self.distance >= NOTABLE and self.p_value < _SIGNIFICANT


def length_shift(one: np.ndarray, other: np.ndarray) -> Shift:
    """Return the Kolmogorov-Smirnov distance between two distributions of lengths.

    Args:
        one, other: the number of texts per length, starting at 0; neither may be empty.

    Returns:
        The largest distance between the cumulative distributions, and its asymptotic p-value, which
        is slightly too large because of ties.
    """
    size = max(len(one), len(other))
    first, second = (np.pad(counts, (0, size - len(counts))) for counts in (one, other))
    n, m = first.sum(), second.sum()
    distance = float(np.abs(np.cumsum(first) / n - np.cumsum(second) / m).max())
    return Shift(distance, float(kolmogorov(np.sqrt(n * m / (n + m)) * distance)))


def label_shift(one: np.ndarray, other: np.ndarray) -> Shift:
    """Return the distance between two distributions of labels.

    Args:
        one, other: the number of rows per label, in the same order; neither may be empty.

    Returns:
        The total variation distance (half the sum of the absolute differences of the shares), and
        the p-value of a chi-squared test of homogeneity, with Yates' correction for two labels.
    """
    used = (one + other) > 0
    first, second = one[used], other[used]
    distance = float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)
    if len(first) < 2:
        return Shift(distance, 1.0)
    from scipy.stats import chi2_contingency  # here: importing it takes half a second

    return Shift(distance, float(chi2_contingency(np.stack([first, second])).pvalue))
