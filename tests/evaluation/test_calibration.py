"""Calibration equals loops over rows and scikit-learn's calibration curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from gptj8.evaluation.calibration import ReliabilityBin, expected_calibration_error, reliability
from gptj8.model.scoring.probabilities import label_probabilities


def scored(rows=500, labels=4, seed=0):
    """Return log-likelihoods of a model that is better than chance, and the true labels."""
    rng = np.random.default_rng(seed)
    actual = rng.integers(labels, size=rows)
    log_likelihoods = rng.normal(-40, 2, (rows, labels))
    log_likelihoods[np.arange(rows), actual] += 2
    return log_likelihoods, actual


def test_probabilities_equal_the_manual_calculation():
    probabilities = label_probabilities(np.log([[0.1, 0.3], [0.5, 0.5]]))
    np.testing.assert_allclose(probabilities, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-12)


def test_probabilities_without_underflow():
    probabilities = label_probabilities(np.array([[-2000.0, -2000.0 - math.log(3), -np.inf]]))
    np.testing.assert_allclose(probabilities, [[0.75, 0.25, 0]], rtol=1e-9)


def test_probabilities_are_float64():
    probabilities = label_probabilities(np.array([[-1.0, -2.0]], dtype=np.float16))
    assert probabilities.dtype == np.float64
    assert probabilities.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_invalid_log_likelihoods_raise(bad):
    with pytest.raises(ValueError, match="row 1"):
        label_probabilities(np.array([[-1.0, -2.0], [bad, -1.0]]))
    with pytest.raises(ValueError, match="row 0"):
        label_probabilities(np.array([[-np.inf, -np.inf]]))


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
def test_bins_equal_scikit_learn(bins):
    log_likelihoods, actual = scored()
    probabilities = label_probabilities(log_likelihoods)
    parts = reliability(probabilities, actual, bins)
    correct = probabilities.argmax(1) == actual
    accuracy, confidence = calibration_curve(correct, probabilities.max(1), n_bins=bins)
    np.testing.assert_allclose([part.accuracy for part in parts], accuracy)
    np.testing.assert_allclose([part.confidence for part in parts], confidence)
    assert sum(part.rows for part in parts) == 500


def test_error_equals_a_loop_over_the_rows():
    log_likelihoods, actual = scored()
    probabilities = label_probabilities(log_likelihoods)
    total = 0.0
    for index in range(15):
        rows = [
            (max(row), float(row.argmax() == label))
            for row, label in zip(probabilities, actual, strict=True)
            if index / 15 < max(row) <= (index + 1) / 15
        ]
        total += abs(sum(right - sure for sure, right in rows))
    error = expected_calibration_error(reliability(probabilities, actual))
    assert error == pytest.approx(total / 500, rel=1e-9)
    assert error > 0.01


def test_edges_belong_to_the_lower_bin():
    probabilities = np.array([[0.5, 0.5], [0.5 + 1e-9, 0.5 - 1e-9], [1.0, 0.0]])
    assert reliability(probabilities, np.array([0, 1, 0]), bins=2) == [
        ReliabilityBin(0.0, 0.5, 1, 0.5, 1.0),
        ReliabilityBin(0.5, 1.0, 2, pytest.approx(0.75), 0.5),
    ]


def test_error_of_calibrated_and_overconfident_models():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 50_000)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    calibrated = (rng.random(50_000) > sure).astype(int)
    assert expected_calibration_error(reliability(probabilities, calibrated)) < 0.01
    chance = rng.integers(2, size=50_000)
    error = expected_calibration_error(reliability(probabilities, chance))
    assert error == pytest.approx(0.25, abs=0.01)


def test_no_rows():
    assert reliability(np.zeros((0, 3)), np.zeros(0, int)) == []
    with pytest.raises(ValueError, match="no rows"):
        expected_calibration_error([])


@pytest.mark.parametrize(
    ("probabilities", "actual"),
    [
        ([[-1.0, -2.0]], [0]),  # log-likelihoods
        ([[math.nan, 1.0]], [0]),
        ([[0.5, 0.5]], [2]),
        ([[0.5, 0.5]], [-1]),
        ([[0.5, 0.5]], [0, 1]),
        ([0.5, 0.5], [0, 1]),
    ],
)
def test_invalid_arguments_raise(probabilities, actual):
    with pytest.raises(ValueError):
        reliability(np.array(probabilities), np.array(actual))
