"""Splits of another kind are told from splits that differ by chance, as scipy's tests tell them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp

from gptj8.dataset.validation.shifts import label_shift, length_shift


@pytest.mark.parametrize("seed", range(5))
def test_lengths_of_shifted_splits_are_told_from_those_of_equal_ones(seed: int) -> None:
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
def test_labels_of_shifted_splits_are_told_from_those_of_equal_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0], [0.2, 0.3, 0.4, 0.1])
    one, same, shifted = (
        rng.multinomial(n, p) for n, p in zip((4000, 900, 900), shares, strict=True)
    )
    for other, notable in ((same, False), (shifted, True)):
        shift = label_shift(one, other)
        table = np.stack([one, other])
        table = table[:, table.any(axis=0)]
        assert shift.p_value == pytest.approx(chi2_contingency(table).pvalue)
        by_hand = sum(abs(a / one.sum() - b / other.sum()) for a, b in zip(one, other, strict=True))
        assert shift.distance == pytest.approx(by_hand / 2)
        assert bool(shift.notable) is notable


@pytest.mark.parametrize("counts", [((40, 60), (70, 30)), ((5, 5), (5, 5)), ((50, 50), (51, 49))])
def test_two_labels_are_compared_with_yates_correction(counts: tuple) -> None:
    one, other = map(np.array, counts)
    expected = chi2_contingency(np.stack([one, other])).pvalue
    assert label_shift(one, other).p_value == pytest.approx(expected)
