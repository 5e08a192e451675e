"""Probabilities of labels from their log-likelihoods. Needs SciPy, which training does not load."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def label_probabilities(log_likelihoods: np.ndarray) -> np.ndarray:
    """Return the probability of each label, given that it is one of them: (rows, labels) float64.

    Args:
        log_likelihoods: (rows, labels) of each label with its end, in nats.

    Raises:
        ValueError: if a row has NaN or positive infinity, or no label that is possible at all.
    """
    log_likelihoods = np.asarray(log_likelihoods, dtype=np.float64)
    usable = np.isfinite(log_likelihoods.max(axis=1))
    if not usable.all():
        raise ValueError(f"the log-likelihoods of row {usable.argmin()} give no probabilities")
    return softmax(log_likelihoods, axis=1)
