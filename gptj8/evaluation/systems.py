"""Names of the evaluated systems in metrics, tables and reports.

This module imports no third-party packages, because commands that only show tables import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ORIGINAL = "base"
"""The original, unquantized model. The perplexity of other systems is compared with it."""

QUANTIZED = "quantized"
"""The 8-bit copy of the original model."""

FEW_SHOT = "few_shot"
"""The 8-bit copy with solved examples in each prompt."""

BASELINE = "baseline"
"""The TF-IDF classifier, which uses no language model."""

TUNED = "tuned"
"""The 8-bit copy with the adapter. The accuracy of other systems is compared with it."""

CONFIDENCE = "_confidence"
"""Follows a system's name in the column of its confidences in predictions.csv."""

WROTE = "_wrote"
"""Follows a system's name in the column of its generated texts in predictions.csv."""

OWN_SYSTEMS = (ORIGINAL, QUANTIZED, FEW_SHOT, BASELINE, TUNED)
"""Reserved names, which external systems cannot use."""


def own_first(systems: Iterable[str], order: Sequence[str] = OWN_SYSTEMS) -> list[str]:
    """Return the systems sorted by `order`, followed by all others in their given order."""
    found = list(systems)
    return [*(s for s in order if s in found), *(s for s in found if s not in order)]
