"""Parse the conditions of `evaluate.require`, such as `tuned/accuracy > 0.8`.

Uses only the standard library, so that checking params.yaml loads no other package.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gptj8.runtime.messages import excerpt

_SIGN = re.compile("([<>]=?)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_METRIC = re.compile(r"(?=.*[A-Za-z])[\w.@-]+(/[\w.@-]+)*", re.ASCII)
_NOT_FINITE = {"nan", "inf", "infinity"}
_FORM = 'write a metric, one of <, <=, >, >= and a metric or a number: "tuned/accuracy_low >= 0.8"'


@dataclass(frozen=True)
class Requirement:
    """A condition on the metrics.

    Attributes:
        left: a metric name.
        comparison: `<`, `<=`, `>` or `>=`.
        right: a metric name or a number.
    """

    left: str
    comparison: str
    right: str | float

    def __str__(self) -> str:
        right = self.right if isinstance(self.right, str) else f"{self.right:.15g}"
        return f"{self.left} {self.comparison} {right}"


def parse_requirement(text: str) -> Requirement:
    """Parse a metric, a comparison, and a metric or a number.

    Raises:
        ValueError: with the problem and the expected form, if the text is invalid.
    """
    shown = excerpt(repr(text))
    parts = [part.strip() for part in _SIGN.split(text)]
    if len(parts) != 3:
        found = "no comparison" if len(parts) == 1 else "more than one comparison"
        raise ValueError(f"{shown} has {found}; {_FORM}")
    left, comparison, right = parts
    if _NUMBER.fullmatch(left):
        raise ValueError(f"{shown} starts with a number; {_FORM}")
    for name in (left, right):
        if name.lower().lstrip("+-") in _NOT_FINITE:
            raise ValueError(f"{shown}: {name} cannot be used in a comparison; {_FORM}")
    for name, side in ((left, "left"), (right, "right")):
        if not name:
            raise ValueError(f"{shown} has nothing on its {side}; {_FORM}")
        if not _METRIC.fullmatch(name) and not _NUMBER.fullmatch(name):
            raise ValueError(f"{shown}: {excerpt(repr(name))} is not a metric name; {_FORM}")
    if _NUMBER.fullmatch(right):
        if not math.isfinite(float(right)):
            raise ValueError(f"{shown}: {excerpt(right)} is too large")
        return Requirement(left, comparison, float(right))
    return Requirement(left, comparison, right)
