"""Intervals for what was measured on a sample.

Two models are compared on the same documents, so the documents are what is resampled, both models'
scores of one together (a paired bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap,
1993; Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004). What makes a
document hard for both cancels out, and the interval is as narrow as the difference deserves. Rows
that are classified are compared in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

_COUNTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the true one with the stated confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """On how many rows only one of two systems is right, and how likely chance is to do that.

    Attributes:
        only_first: rows that the first system alone has right.
        only_second: rows that the second system alone has right.
        p_value: two-sided; of a split at least as uneven if neither system were the better one.
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
        tokens: (documents,) tokens of each document, the same for both.
        resamples: bootstrap samples; each draws as many documents as there are, with replacement.
        rng: the only source of chance.
        confidence: of the interval, two-sided.

    Raises:
        ValueError: if the arrays do not match or no document has a token.
    """
    difference = np.asarray(nll, dtype=np.float64) - np.asarray(reference_nll, dtype=np.float64)
    tokens = np.asarray(tokens, dtype=np.float64)
    if difference.shape != tokens.shape or tokens.ndim != 1:
        raise ValueError(f"shapes {difference.shape} and {tokens.shape} are not of one list")
    difference, tokens = difference[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        raise ValueError("no document has a token")
    log_ratios = _resampled_ratios(difference, tokens, resamples, rng)
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(log_ratios, [tail, 1 - tail]))
    return Estimate(float(np.exp(difference.sum() / tokens.sum())), float(low), float(high))


def _resampled_ratios(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return sum(numerator) / sum(denominator) of each resample: (resamples,) float64."""
    documents = len(numerator)
    pair = np.stack([numerator, denominator], axis=1)
    rows = max(1, _COUNTS_AT_ONCE // documents)
    ratios = []
    for begin in range(0, resamples, rows):
        size = min(rows, resamples - begin)
        # How often each document is drawn says all: a product replaces gathering the draws.
        drawn = rng.integers(documents, size=(size, documents))
        drawn += np.arange(size)[:, None] * documents
        counts = np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)
        sums = counts @ pair
        ratios.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(ratios)


def accuracy_interval(correct: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Return the share of correct rows with Wilson's score interval.

    The interval is never empty and stays within 0 and 1, also where every row is correct, or none
    (Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927).

    Args:
        correct: (rows,) bool.
        confidence: of the interval, two-sided.

    Raises:
        ValueError: if there are no rows, or if they are not bool.
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

    Only rows that one system alone has right tell the two apart. Where they are few, resampling
    them as they are is overconfident: without any, the interval would be a point, and with one its
    end would be 0. So two rows are added, one in favour of each system, as Bonett and Price do
    (Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired
    Data, 2012). Two systems that agree on all of n rows then differ by 0 within about 3/n.

    Args:
        correct: (rows,) bool: what the system has right.
        reference_correct: (rows,) bool: what the reference has right, of the same rows.
        resamples: bootstrap samples, drawn from the table of four counts and not from the rows.
        rng: the only source of chance.
        confidence: of the interval, two-sided.

    Raises:
        ValueError: if there are no rows, or if they do not match or are not bool.
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
    """Return McNemar's test of two systems on the same rows, in its exact form.

    Rows that both have right or both have wrong say nothing. Of the others each system is right on
    about half if neither is the better one: a binomial test, two-sided (McNemar, Note on the
    Sampling Error of the Difference Between Correlated Proportions or Percentages, 1947).

    Args:
        correct: (rows,) bool: what the first system has right.
        reference_correct: (rows,) bool: what the second system has right.

    Raises:
        ValueError: if there are no rows, or if they do not match or are not bool.
    """
    only_first, only_second = _discordant(correct, reference_correct)
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def _discordant(correct: np.ndarray, reference_correct: np.ndarray) -> tuple[int, int]:
    """Return how many rows only the first and only the second has right."""
    _require_outcomes(correct)
    _require_outcomes(reference_correct)
    if len(correct) != len(reference_correct):
        raise ValueError(f"{len(correct)} and {len(reference_correct)} rows are not the same ones")
    first, second = np.asarray(correct), np.asarray(reference_correct)
    return int(np.count_nonzero(first & ~second)), int(np.count_nonzero(second & ~first))


def _require_outcomes(correct: np.ndarray) -> None:
    outcomes = np.asarray(correct)
    if outcomes.ndim != 1 or outcomes.dtype != np.bool_ or not len(outcomes):
        raise ValueError(f"{outcomes.dtype} of shape {outcomes.shape} is not (rows,) bool")
