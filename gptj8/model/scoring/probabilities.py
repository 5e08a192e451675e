"""Convert log-likelihoods to label probabilities. Needs SciPy, which training does not load."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def label_probabilities(log_likelihoods: np.ndarray) -> np.ndarray:
    """Return the softmax of the log-likelihoods over the labels: (rows, labels) float64.

    Args:
        log_likelihoods: (rows, labels), including the end token of each label, in nats.

    Raises:
        ValueError: if a row contains NaN or positive infinity, or only negative infinity.
    """
    log_likelihoods = np.asarray(log_likelihoods, dtype=np.float64)
    usable = np.isfinite(log_likelihoods.max(axis=1))
    if not usable.all():
        raise ValueError(f"row {usable.argmin()}: log-likelihoods are NaN, inf, or all -inf")
    return softmax(log_likelihoods, axis=1)
