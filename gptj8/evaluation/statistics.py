"""Confidence intervals and tests for metrics that are measured on a sample.

Two models are compared on the same documents, so the bootstrap resamples documents and keeps the
two scores of a document together (paired bootstrap: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993; Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004).
The difficulty that a document has for both models cancels out, which makes the interval narrower.
Classified rows are compared in the same way.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

_COUNTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test.

    Attributes:
        only_first: number of rows that only the first system predicts correctly.
        only_second: number of rows that only the second system predicts correctly.
        p_value: two-sided probability of a split at least as uneven if both systems are equally
            good. It is never 0: with more than a thousand rows it may be below the smallest
            normal float, 2.2e-308, which then stands for it.
    """

    only_first: int
    only_second: int
    p_value: float


def perplexity_ratio(
    nll: np.ndarray,
    reference_nll: np.ndarray,
    tokens: np.ndarray,
    *,
    resamples: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Estimate:
    """Return perplexity(model) / perplexity(reference) with a percentile bootstrap interval.

    Args:
        nll: (documents,) summed negative log-likelihood under the model, in nats.
        reference_nll: (documents,) the same under the reference model.
        tokens: (documents,) number of tokens of each document, equal for both models.
        resamples: number of bootstrap samples. A sample draws as many documents as `nll` has, with
            replacement.
        rng: random number generator.
        confidence: two-sided confidence level of the interval.

    Raises:
        ValueError: if the shapes do not match or no document has tokens.
    """
    difference = np.asarray(nll, dtype=np.float64) - np.asarray(reference_nll, dtype=np.float64)
    tokens = np.asarray(tokens, dtype=np.float64)
    if difference.shape != tokens.shape or tokens.ndim != 1:
        raise ValueError(
            f"nll and tokens must be 1-D and of equal length, not {difference.shape} and "
            f"{tokens.shape}"
        )
    mean = mean_per_token(difference, tokens, resamples=resamples, rng=rng, confidence=confidence)
    return Estimate(*(float(np.exp(end)) for end in (mean.value, mean.low, mean.high)))


def mean_per_token(
    sums: np.ndarray,
    tokens: np.ndarray,
    *,
    resamples: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Estimate:
    """Return the sum over all documents per token, with a percentile bootstrap interval.

    Args:
        sums: (documents,) sum over the tokens of each document.
        tokens: (documents,) number of tokens of each document.
        resamples, rng, confidence: see `perplexity_ratio`.

    Raises:
        ValueError: if no document has tokens.
    """
    sums, tokens = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        raise ValueError("no document has tokens")
    tail = (1 - confidence) / 2
    means = _resampled_ratios(sums, tokens, resamples, rng)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(sums.sum() / tokens.sum()), float(low), float(high))


def _resampled_ratios(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return sum(numerator) / sum(denominator) per bootstrap sample: (resamples,) float64."""
    documents = len(numerator)
    pair = np.stack([numerator, denominator], axis=1)
    rows = max(1, _COUNTS_AT_ONCE // documents)
    ratios = []
    for begin in range(0, resamples, rows):
        size = min(rows, resamples - begin)
        # Only the number of draws of each document matters, so a matrix product is sufficient.
        drawn = rng.integers(documents, size=(size, documents))
        drawn += np.arange(size)[:, None] * documents
        counts = np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)
        sums = counts @ pair
        ratios.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(ratios)


def accuracy_interval(correct: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Return the share of correct rows with Wilson's score interval.

    The interval has a positive width and stays between 0 and 1, even if all rows or no rows are
    correct (Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927).

    Args:
        correct: (rows,) bool.
        confidence: two-sided confidence level of the interval.

    Raises:
        ValueError: if `correct` is empty or not bool.
    """
    _require_outcomes(correct)
    right = int(np.count_nonzero(correct))
    interval = binomtest(right, len(correct)).proportion_ci(confidence, method="wilson")
    return Estimate(right / len(correct), float(interval.low), float(interval.high))


def accuracy_difference(
    correct: np.ndarray,
    reference_correct: np.ndarray,
    *,
    resamples: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Estimate:
    """Return accuracy - reference accuracy with a paired percentile bootstrap interval.

    Only rows that exactly one system predicts correctly contribute to the difference. If there are
    few of them, a plain bootstrap is overconfident: with none, the interval is a single point, and
    with one, it ends at 0. Therefore two rows are added, one in favor of each system, as in Bonett
    and Price (Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
    Paired Data, 2012). For two systems that agree on all of n rows, the interval is about 0 ± 3/n.

    Args:
        correct: (rows,) bool, whether the system is correct.
        reference_correct: (rows,) bool, whether the reference is correct on the same rows.
        resamples: number of bootstrap samples, drawn from the counts instead of from the rows.
        rng: random number generator.
        confidence: two-sided confidence level of the interval.

    Raises:
        ValueError: if an array is empty or not bool, or their lengths differ.
    """
    only_first, only_second = _discordant(correct, reference_correct)
    rows = len(correct)
    table = np.array([only_first + 1, only_second + 1, rows - only_first - only_second])
    drawn = rng.multinomial(rows + 2, table / (rows + 2), size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / (rows + 2)
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Estimate((only_first - only_second) / rows, float(low), float(high))


def mcnemar(correct: np.ndarray, reference_correct: np.ndarray) -> McNemar:
    """Return the exact McNemar test of two systems on the same rows.

    Rows on which both systems are correct or both are wrong are ignored. If the systems are equally
    good, each is correct on about half of the other rows. This is a two-sided binomial test
    (McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions or
    Percentages, 1947).

    Args:
        correct: (rows,) bool, whether the first system is correct.
        reference_correct: (rows,) bool, whether the second system is correct.

    Raises:
        ValueError: if an array is empty or not bool, or their lengths differ.
    """
    only_first, only_second = _discordant(correct, reference_correct)
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, max(p_value, sys.float_info.min))


def _discordant(correct: np.ndarray, reference_correct: np.ndarray) -> tuple[int, int]:
    """Return the numbers of rows that only the first or only the second system has correct."""
    _require_outcomes(correct)
    _require_outcomes(reference_correct)
    if len(correct) != len(reference_correct):
        raise ValueError(
            f"{len(correct)} and {len(reference_correct)} rows: the two lengths must be equal"
        )
    first, second = np.asarray(correct), np.asarray(reference_correct)
    return int(np.count_nonzero(first & ~second)), int(np.count_nonzero(second & ~first))


def _require_outcomes(correct: np.ndarray) -> None:
    outcomes = np.asarray(correct)
    if outcomes.ndim != 1 or outcomes.dtype != np.bool_ or not len(outcomes):
        raise ValueError(f"{outcomes.dtype} of shape {outcomes.shape} is not (rows,) bool")
