"""Tests of shifts between splits, against the tests of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, ks_2samp

from gptj8.dataset.validation.shifts import label_shift, length_shift


@pytest.mark.parametrize("seed", range(5))
def test_only_shifted_lengths_are_notable(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.poisson(mean, size) for mean, size in ((80, 4000), (80, 900), (110, 900))]
    counts = [np.bincount(length) for length in lengths]
    for other, notable in ((1, False), (2, True)):
        shift = length_shift(counts[0], counts[other])
        exact = ks_2samp(lengths[0], lengths[other], method="asymp")
        assert shift.distance == pytest.approx(exact.statistic, abs=1e-12)
        assert shift.p_value == pytest.approx(exact.pvalue, rel=0.1, abs=1e-3)
        assert bool(shift.notable) is notable


@pytest.mark.parametrize("seed", range(5))
def test_only_shifted_labels_are_notable(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0], [0.2, 0.3, 0.4, 0.1])
    one, same, shifted = (
        rng.multinomial(n, p) for n, p in zip((4000, 900, 900), shares, strict=True)
    )
    for other, notable in ((same, False), (shifted, True)):
        shift = label_shift(one, other)
        assert shift.p_value == pytest.approx(permuted_p_value(one, other, rng), abs=0.03)
        by_hand = sum(abs(a / one.sum() - b / other.sum()) for a, b in zip(one, other, strict=True))
        assert shift.distance == pytest.approx(by_hand / 2)
        assert bool(shift.notable) is notable


@pytest.mark.parametrize(
    ("counts", "statistic"),
    [
        (((40, 60), (70, 30)), 2 * 14.5**2 / 55 + 2 * 14.5**2 / 45),
        (((5, 5), (5, 5)), 0),
        (((50, 50), (51, 49)), 0),
    ],
)
def test_two_labels_are_compared_with_yates_correction(counts: tuple, statistic: float) -> None:
    """Counted by hand: each cell contributes (|observed - expected| - 0.5)^2 / expected."""
    one, other = map(np.array, counts)
    assert label_shift(one, other).p_value == pytest.approx(chi2.sf(statistic, 1), rel=0.01)


def permuted_p_value(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> float:
    """How often shuffled labels are at least as far apart, by the chi-squared statistic."""

    def statistic(first: np.ndarray, second: np.ndarray) -> float:
        table = np.stack([first, second]).astype(float)
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        used = expected > 0
        return float(((table - expected)[used] ** 2 / expected[used]).sum())

    labels = np.repeat(np.arange(len(one)), one + other)
    found, size = statistic(one, other), int(one.sum())
    at_least = 0
    for _ in range(2000):
        rng.shuffle(labels)
        first = np.bincount(labels[:size], minlength=len(one))
        at_least += statistic(first, one + other - first) >= found
    return at_least / 2000
