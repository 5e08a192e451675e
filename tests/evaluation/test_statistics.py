"""Intervals and tests are checked against known values, brute force and manual calculations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gptj8.evaluation import statistics
from gptj8.evaluation.statistics import (
    McNemar,
    accuracy_difference,
    accuracy_interval,
    mcnemar,
    perplexity_ratio,
)


def simulated(rng, documents=80, shift=0.002):
    """Return documents of varying difficulty and length, for a model worse by `shift` per token."""
    tokens = rng.integers(5, 300, documents)
    difficulty = rng.gamma(9, 0.4, documents)
    noise = rng.normal(0, 0.02, documents)
    reference = tokens * difficulty
    return reference + tokens * (shift + noise), reference, tokens


def test_ratio_interval_covers_the_true_ratio():
    rng = np.random.default_rng(0)
    truth = np.exp(0.002)
    covered = 0
    for _ in range(1000):
        nll, reference, tokens = simulated(rng)
        estimate = perplexity_ratio(nll, reference, tokens, resamples=500, rng=rng)
        covered += estimate.low <= truth <= estimate.high
    assert 930 <= covered <= 970


def test_ratio_is_the_quotient_of_perplexities():
    nll, reference, tokens = simulated(np.random.default_rng(1))
    expected = np.exp(nll.sum() / tokens.sum()) / np.exp(reference.sum() / tokens.sum())
    estimate = perplexity_ratio(nll, reference, tokens, resamples=100, rng=np.random.default_rng(0))
    assert estimate.value == pytest.approx(expected, rel=1e-12)
    assert estimate.low < estimate.value < estimate.high


def test_ratio_interval_equals_brute_force():
    nll, reference, tokens = simulated(np.random.default_rng(2), documents=7)
    rng = np.random.default_rng(3)
    ratios = []
    for drawn in rng.integers(7, size=(400, 7)):
        model = np.exp(nll[drawn].sum() / tokens[drawn].sum())
        ratios.append(model / np.exp(reference[drawn].sum() / tokens[drawn].sum()))
    estimate = perplexity_ratio(nll, reference, tokens, resamples=400, rng=np.random.default_rng(3))
    low, high = np.log(estimate.low), np.log(estimate.high)
    np.testing.assert_allclose([low, high], np.quantile(np.log(ratios), [0.025, 0.975]), rtol=1e-9)


def test_chunked_resampling_gives_the_same_result(monkeypatch):
    nll, reference, tokens = simulated(np.random.default_rng(4))
    single = perplexity_ratio(nll, reference, tokens, resamples=300, rng=np.random.default_rng(0))
    monkeypatch.setattr(statistics, "_COUNTS_AT_ONCE", 1000)
    parts = perplexity_ratio(nll, reference, tokens, resamples=300, rng=np.random.default_rng(0))
    assert parts.value == single.value
    assert parts.low == pytest.approx(single.low, abs=1e-12)
    assert parts.high == pytest.approx(single.high, abs=1e-12)


def test_equal_models_have_ratio_one():
    nll = np.array([3.0, 8.0, 1.0])
    tokens = np.array([1, 3, 0])
    estimate = perplexity_ratio(nll, nll, tokens, resamples=100, rng=np.random.default_rng(0))
    assert (estimate.value, estimate.low, estimate.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("nll", "tokens"), [([1.0, 2.0], [1]), ([1.0], [0]), ([], []), ([[1.0]], [[1]])]
)
def test_invalid_documents_raise(nll, tokens):
    with pytest.raises(ValueError):
        perplexity_ratio(
            np.array(nll),
            np.array(nll),
            np.array(tokens),
            resamples=100,
            rng=np.random.default_rng(0),
        )


def paired(both, only_first, only_second, neither):
    """Return the outcomes of two systems with the given counts."""
    counts = both, only_first, only_second, neither
    first = np.repeat([True, True, False, False], counts)
    second = np.repeat([True, False, True, False], counts)
    return first, second


def difference(*counts, resamples=2000, confidence=0.95):
    rng = np.random.default_rng(0)
    pair = paired(*counts)
    return accuracy_difference(*pair, resamples=resamples, rng=rng, confidence=confidence)


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (10, 10), (7, 10), (1, 1), (398, 1000)])
def test_accuracy_interval_inverts_the_score_test(right, rows):
    """The observed share is 1.96 standard errors from each end of the interval."""
    estimate = accuracy_interval(np.arange(rows) < right)
    assert estimate.value == right / rows
    for end in (estimate.low, estimate.high):
        distance = abs(estimate.value - end)
        if distance > 1e-9:
            assert distance / math.sqrt(end * (1 - end) / rows) == pytest.approx(1.959964, rel=1e-6)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0


def test_accuracy_interval_covers_the_true_accuracy():
    rng = np.random.default_rng(0)
    intervals = [accuracy_interval(rng.random(150) < 0.82) for _ in range(1000)]
    assert 930 <= sum(part.low <= 0.82 <= part.high for part in intervals) <= 975


def test_lower_confidence_gives_a_narrower_interval():
    correct = np.arange(100) < 60
    narrow, wide = accuracy_interval(correct, 0.8), accuracy_interval(correct)
    assert wide.low < narrow.low < narrow.high < wide.high
    narrow, wide = difference(40, 12, 6, 40, confidence=0.8), difference(40, 12, 6, 40)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("only_first", "only_second", "rows"),
    [(0.10, 0.07, 400), (0.2, 0.1, 300), (0.05, 0.02, 200), (0.003, 0.001, 1000)],
)
def test_difference_interval_covers_the_true_difference(only_first, only_second, rows):
    rng = np.random.default_rng(0)
    chances = [0.5 - only_first, only_first, only_second, 0.5 - only_second]
    truth = only_first - only_second
    covered = 0
    for _ in range(1000):
        pair = paired(*rng.multinomial(rows, chances))
        estimate = accuracy_difference(*pair, resamples=500, rng=rng)
        covered += estimate.low <= truth <= estimate.high
    assert 930 <= covered <= 970


def test_difference_equals_a_bootstrap_over_rows():
    """With the two added rows, resampling individual rows gives the same distribution."""
    first, second = paired(60, 25, 11, 24)
    gain = np.concatenate([first.astype(int) - second, [1, -1]])
    rng = np.random.default_rng(1)
    draws = gain[rng.integers(len(gain), size=(20_000, len(gain)))].mean(axis=1)
    estimate = difference(60, 25, 11, 24, resamples=20_000)
    assert estimate.value == pytest.approx((25 - 11) / 120)
    low, high = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose([estimate.low, estimate.high], [low, high], atol=1.01 / 122)


def test_interval_is_three_rows_wide_if_all_rows_agree():
    estimate = difference(700, 0, 0, 300)
    assert estimate.value == 0
    assert [estimate.low * 1002, estimate.high * 1002] == pytest.approx([-3, 3])


def test_one_discordant_row_is_not_significant():
    estimate = difference(700, 1, 0, 299)
    assert estimate.low < 0 < estimate.value == 0.001 < estimate.high


def test_difference_is_within_its_interval():
    for only_first, only_second, same in itertools.product(range(8), range(8), (0, 1, 5)):
        if only_first + only_second + same:
            estimate = difference(same, only_first, only_second, 0, resamples=300)
            assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_difference_does_not_resample_individual_rows():
    rng = np.random.default_rng(0)
    first, second = rng.random(2_000_000) < 0.8, rng.random(2_000_000) < 0.79
    estimate = accuracy_difference(first, second, resamples=10_000, rng=rng)
    assert estimate.low < 0.01 < estimate.high
    assert estimate.high - estimate.low < 0.002


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (5, 0), (3, 9), (6, 6), (20, 2)]
)
def test_mcnemar_equals_the_manual_calculation(only_first, only_second):
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    expected = min(1.0, 2 * tail / 2**discordant)
    actual = mcnemar(*paired(10, only_first, only_second, 4))
    assert actual == McNemar(only_first, only_second, pytest.approx(expected, rel=1e-12))


def test_a_p_value_is_never_zero():
    """Of 1,200 rows that only one of two systems has right, 2 / 2**1200 is no float."""
    found = mcnemar(*paired(0, 1200, 0, 1))
    assert found.only_first == 1200
    assert 0 < found.p_value < 1e-300
    assert mcnemar(*paired(0, 60, 0, 1)).p_value == pytest.approx(2 / 2**60)


def test_invalid_outcomes_raise():
    good, rng = np.array([True, False]), np.random.default_rng(0)
    for bad in (np.array([], bool), np.array([[True, False]]), np.array(["a", "b"], object)):
        with pytest.raises(ValueError, match="is not \\(rows,\\) bool"):
            accuracy_interval(bad)
        with pytest.raises(ValueError, match="is not \\(rows,\\) bool"):
            accuracy_difference(good, bad, resamples=10, rng=rng)
        with pytest.raises(ValueError, match="is not \\(rows,\\) bool"):
            mcnemar(bad, good)
    with pytest.raises(ValueError, match="2 and 1 rows"):
        mcnemar(good, good[:1])
