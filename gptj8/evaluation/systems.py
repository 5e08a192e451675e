"""The systems that are measured here, by the names that metrics, tables and reports have for them.

Needs no library: a command that shows a table asks it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ORIGINAL = "base"
"""The original model, unquantized. Perplexities are compared with its."""

QUANTIZED = "quantized"
"""Its 8-bit copy."""

FEW_SHOT = "few_shot"
"""The 8-bit copy with solved examples before each prompt."""

BASELINE = "baseline"
"""No language model at all."""

TUNED = "tuned"
"""The 8-bit copy with the adapter. Accuracies of the others are compared with its."""

OWN_SYSTEMS = (ORIGINAL, QUANTIZED, FEW_SHOT, BASELINE, TUNED)
"""No system from outside may have one of these names."""


def own_first(systems: Iterable[str], order: Sequence[str] = OWN_SYSTEMS) -> list[str]:
    """Return the systems in `order`, those that it does not name behind, as they come."""
    found = list(systems)
    return [*(s for s in order if s in found), *(s for s in found if s not in order)]
