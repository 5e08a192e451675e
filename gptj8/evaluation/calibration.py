"""Whether a model is right as often as it is sure.

A classifier by likelihood gives each label a probability. It is calibrated if of all rows that it
is 80 % sure of, 80 % are right, whatever its accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptj8.model.scoring.probabilities import label_probabilities

_ROUNDING = 1e-6


@dataclass(frozen=True)
class ReliabilityBin:
    """The rows whose predicted label has a probability above `low` and up to `high`.

    Attributes:
        low: the bin's lower end; 0 itself belongs to the first bin.
        high: the bin's upper end.
        rows: how many there are, at least one.
        confidence: mean probability of the predicted label.
        accuracy: share of rows whose predicted label is the actual one.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def reliability(
    probabilities: np.ndarray, actual: np.ndarray, bins: int = 15
) -> list[ReliabilityBin]:
    """Group rows by the probability of their predicted label, the first one of the likeliest.

    Args:
        probabilities: (rows, labels).
        actual: (rows,) index of each row's true label.
        bins: of equal width between 0 and 1; those without a row are left out.

    Raises:
        ValueError: if the arrays do not match, or hold no probabilities or no index of a label.
    """
    probabilities, actual = np.asarray(probabilities), np.asarray(actual)
    if probabilities.ndim != 2 or actual.shape != probabilities.shape[:1]:
        raise ValueError(f"shapes {probabilities.shape} and {actual.shape} are not of one test")
    if not ((probabilities >= 0) & (probabilities <= 1 + _ROUNDING)).all():
        raise ValueError("probabilities are between 0 and 1")
    if not ((actual >= 0) & (actual < probabilities.shape[1])).all():
        raise ValueError(f"a true label is not one of the {probabilities.shape[1]}")
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
    """Return by how much confidence and accuracy differ, as a mean over rows, bin by bin.

    Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning,
    2015; Guo et al., On Calibration of Modern Neural Networks, 2017.

    Raises:
        ValueError: if there are no bins.
    """
    rows = sum(part.rows for part in bins)
    if not rows:
        raise ValueError("there are no rows")
    return sum(part.rows * abs(part.confidence - part.accuracy) for part in bins) / rows


def reliability_curves(
    labels: Sequence[str], actual: Sequence[str], likelihoods: Mapping[str, np.ndarray]
) -> dict[str, list[ReliabilityBin]]:
    """Return the reliability of each system that has log-likelihoods."""
    places = {label: index for index, label in enumerate(labels)}
    return {
        system: reliability(label_probabilities(scores), np.array([places[a] for a in actual]))
        for system, scores in likelihoods.items()
    }
