"""Intervals for what was measured on a sample.

Two models are compared on the same documents, so the documents are what is resampled, both models'
scores of one together (a paired bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap,
1993; Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004). What makes a
document hard for both cancels out, and the interval is as narrow as the difference deserves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_COUNTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the true one with the stated confidence."""

    value: float
    low: float
    high: float


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
