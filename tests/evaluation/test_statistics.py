"""The bootstrap against known truth and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from gptj8.evaluation import statistics
from gptj8.evaluation.statistics import perplexity_ratio


def simulated(rng, documents=80, shift=0.002):
    """Documents whose difficulty and length vary widely, and a model `shift` nats a token worse."""
    tokens = rng.integers(5, 300, documents)
    difficulty = rng.gamma(9, 0.4, documents)
    noise = rng.normal(0, 0.02, documents)
    reference = tokens * difficulty
    return reference + tokens * (shift + noise), reference, tokens


def test_covers_the_known_ratio():
    rng = np.random.default_rng(0)
    truth = np.exp(0.002)
    covered = 0
    for _ in range(1000):
        nll, reference, tokens = simulated(rng)
        estimate = perplexity_ratio(nll, reference, tokens, resamples=500, rng=rng)
        covered += estimate.low <= truth <= estimate.high
    assert 930 <= covered <= 970


def test_value_is_the_ratio_of_the_perplexities():
    nll, reference, tokens = simulated(np.random.default_rng(1))
    expected = np.exp(nll.sum() / tokens.sum()) / np.exp(reference.sum() / tokens.sum())
    estimate = perplexity_ratio(nll, reference, tokens, resamples=100, rng=np.random.default_rng(0))
    assert estimate.value == pytest.approx(expected, rel=1e-12)
    assert estimate.low < estimate.value < estimate.high


def test_equals_brute_force():
    nll, reference, tokens = simulated(np.random.default_rng(2), documents=7)
    rng = np.random.default_rng(3)
    ratios = []
    for drawn in rng.integers(7, size=(400, 7)):
        model = np.exp(nll[drawn].sum() / tokens[drawn].sum())
        ratios.append(model / np.exp(reference[drawn].sum() / tokens[drawn].sum()))
    estimate = perplexity_ratio(nll, reference, tokens, resamples=400, rng=np.random.default_rng(3))
    low, high = np.log(estimate.low), np.log(estimate.high)
    np.testing.assert_allclose([low, high], np.quantile(np.log(ratios), [0.025, 0.975]), rtol=1e-9)


def test_many_documents_are_drawn_in_parts(monkeypatch):
    nll, reference, tokens = simulated(np.random.default_rng(4))
    whole = perplexity_ratio(nll, reference, tokens, resamples=300, rng=np.random.default_rng(0))
    monkeypatch.setattr(statistics, "_COUNTS_AT_ONCE", 1000)
    parts = perplexity_ratio(nll, reference, tokens, resamples=300, rng=np.random.default_rng(0))
    assert parts.value == whole.value
    assert parts.low == pytest.approx(whole.low, abs=1e-12)
    assert parts.high == pytest.approx(whole.high, abs=1e-12)


def test_equal_models_have_a_ratio_of_one():
    nll = np.array([3.0, 8.0, 1.0])
    tokens = np.array([1, 3, 0])
    estimate = perplexity_ratio(nll, nll, tokens, resamples=100, rng=np.random.default_rng(0))
    assert (estimate.value, estimate.low, estimate.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("nll", "tokens"), [([1.0, 2.0], [1]), ([1.0], [0]), ([], []), ([[1.0]], [[1]])]
)
def test_what_makes_no_sense_is_refused(nll, tokens):
    with pytest.raises(ValueError):
        perplexity_ratio(
            np.array(nll),
            np.array(nll),
            np.array(tokens),
            resamples=100,
            rng=np.random.default_rng(0),
        )
