"""Measure calibration: whether the confidence of a model matches its accuracy.

A classifier by likelihood assigns a probability to each label. It is calibrated if, for example,
80 % of the rows predicted with a confidence of 80 % are correct. Calibration does not depend on
overall accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptj8.model.scoring.probabilities import label_probabilities

_ROUNDING = 1e-6


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose predicted label has a probability above `low` and up to `high`.

    Attributes:
        low: lower end of the bin, exclusive; the first bin includes 0.
        high: upper end of the bin, inclusive.
        rows: number of rows, at least 1.
        confidence: mean probability of the predicted label.
        accuracy: share of rows whose predicted label is the true label.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def reliability(
    probabilities: np.ndarray, actual: np.ndarray, bins: int = 15
) -> list[ReliabilityBin]:
    """Group rows into bins by the probability of their predicted label.

    The predicted label is the most likely one; ties go to the first label.

    Args:
        probabilities: (rows, labels).
        actual: (rows,) index of the true label of each row.
        bins: number of bins of equal width between 0 and 1; empty bins are omitted.

    Raises:
        ValueError: if the shapes do not match, a probability is not between 0 and 1, or an index in
            `actual` is out of range.
    """
    probabilities, actual = np.asarray(probabilities), np.asarray(actual)
    if probabilities.ndim != 2 or actual.shape != probabilities.shape[:1]:
        raise ValueError(f"shapes {probabilities.shape} and {actual.shape} do not match")
    if not ((probabilities >= 0) & (probabilities <= 1 + _ROUNDING)).all():
        raise ValueError("probabilities must be between 0 and 1")
    if not ((actual >= 0) & (actual < probabilities.shape[1])).all():
        raise ValueError(f"actual has an index out of range for {probabilities.shape[1]} labels")
    if not len(actual):
        return []
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(actual)), predicted]
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    rows = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence, minlength=bins)
    right = np.bincount(place, weights=predicted == actual, minlength=bins)
    return [
        ReliabilityBin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            rows=int(rows[index]),
            confidence=float(sure[index] / rows[index]),
            accuracy=float(right[index] / rows[index]),
        )
        for index in np.flatnonzero(rows)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean absolute difference of confidence and accuracy, with bins weighted by rows.

    Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning,
    2015; Guo et al., On Calibration of Modern Neural Networks, 2017.

    Raises:
        ValueError: if there are no bins.
    """
    rows = sum(part.rows for part in bins)
    if not rows:
        raise ValueError("the bins have no rows")
    return sum(part.rows * abs(part.confidence - part.accuracy) for part in bins) / rows


def reliability_curves(
    labels: Sequence[str], actual: Sequence[str], likelihoods: Mapping[str, np.ndarray]
) -> dict[str, list[ReliabilityBin]]:
    """Return the reliability bins of each system with log-likelihoods.

    Args:
        labels: all labels.
        actual: (rows,) true labels.
        likelihoods: system -> (rows, labels) log-likelihoods.
    """
    places = {label: index for index, label in enumerate(labels)}
    return {
        system: reliability(label_probabilities(scores), np.array([places[a] for a in actual]))
        for system, scores in likelihoods.items()
    }
