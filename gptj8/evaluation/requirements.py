"""What the metrics have to meet, written as people write it: `tuned/accuracy > base/accuracy`.

Nothing but the standard library is needed: params.yaml is checked without loading any other.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import excerpt, listed, quote, suggest

_STAGE = "evaluate"
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SIGN = re.compile("([<>]=?)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_METRIC = re.compile(r"(?=.*[A-Za-z])[\w.@-]+(/[\w.@-]+)*", re.ASCII)
_NO_VALUES = {"nan", "inf", "infinity"}
_FORM = 'write a metric, one of <, <=, >, >= and a metric or a number: "tuned/accuracy_low >= 0.8"'


@dataclass(frozen=True)
class Requirement:
    """A comparison that has to hold.

    Attributes:
        left: a metric's name.
        comparison: `<`, `<=`, `>` or `>=`.
        right: a metric's name, or a number.
    """

    left: str
    comparison: str
    right: str | float

    def __str__(self) -> str:
        right = self.right if isinstance(self.right, str) else f"{self.right:.15g}"
        return f"{self.left} {self.comparison} {right}"


@dataclass(frozen=True)
class Outcome:
    """A requirement with the values of both sides.

    Attributes:
        requirement: what was asked for.
        left: value of the left side.
        right: value of the right side.
        met: whether it holds; with NaN on a side it never does.
        margin: how far it is from not holding, negative where it does not hold, NaN with NaN.
    """

    requirement: Requirement
    left: float
    right: float
    met: bool
    margin: float

    def __str__(self) -> str:
        values = f"{self.left:.6g} {self.requirement.comparison} {self.right:.6g}"
        if math.isnan(self.margin):
            ending = "cannot hold"
        elif self.met:
            ending = f"holds by {self.margin:.3g}"
        else:
            ending = f"misses by {abs(self.margin):.3g}"
        return f"{self.requirement} is {'met' if self.met else 'not met'}: {values} {ending}"


def parse_requirement(text: str) -> Requirement:
    """Read a metric, a comparison, and a metric or a number.

    Raises:
        ValueError: saying what is wrong and how it is written.
    """
    shown = excerpt(repr(text))
    parts = [part.strip() for part in _SIGN.split(text)]
    if len(parts) != 3:
        found = "no comparison" if len(parts) == 1 else "more than one comparison"
        raise ValueError(f"{shown} has {found}; {_FORM}")
    left, comparison, right = parts
    if _NUMBER.fullmatch(left):
        raise ValueError(f"{shown} begins with a number; {_FORM}")
    for name in (left, right):
        if name.lower().lstrip("+-") in _NO_VALUES:
            raise ValueError(f"{shown}: nothing can be compared with {name}; {_FORM}")
    for name, side in ((left, "left"), (right, "right")):
        if not name:
            raise ValueError(f"{shown} has nothing on its {side}; {_FORM}")
        if not _METRIC.fullmatch(name) and not _NUMBER.fullmatch(name):
            raise ValueError(f"{shown}: {excerpt(repr(name))} is no name of a metric; {_FORM}")
    if _NUMBER.fullmatch(right):
        if not math.isfinite(float(right)):
            raise ValueError(f"{shown}: {excerpt(right)} is too large a number")
        return Requirement(left, comparison, float(right))
    return Requirement(left, comparison, right)


def check_requirements(
    requirements: Sequence[Requirement], metrics: Mapping[str, Mapping[str, float]]
) -> list[Outcome]:
    """Return the outcome of each requirement, in their order.

    Args:
        requirements: as parsed.
        metrics: stage -> name -> value. A name is looked up in stage `evaluate` as it stands, then
            in the stage before its first slash: `finetune/eval_loss`.

    Raises:
        UserError: naming every metric that is not there, a line each.
    """
    known = {
        f"{stage}/{name}": v for stage, values in metrics.items() for name, v in values.items()
    }
    known |= metrics.get(_STAGE, {})
    problems: dict[str, None] = {}
    for requirement in requirements:
        for name in (requirement.left, requirement.right):
            if isinstance(name, str) and name not in known:
                problems[f"{requirement}: {_explain_unknown(name, known)}"] = None
    if problems:
        raise UserError("\n".join(problems))
    return [_check(requirement, known) for requirement in requirements]


def require_all(texts: Sequence[str], metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a model that misses one of the requirements.

    Raises:
        UserError: a line for each that is not met, and by how much; see also `check_requirements`.
    """
    outcomes = check_requirements([parse_requirement(text) for text in texts], metrics)
    missed = [f"evaluate.require: {outcome}" for outcome in outcomes if not outcome.met]
    if missed:
        raise UserError("\n".join([*missed, "the model is neither exported nor registered"]))


def _check(requirement: Requirement, known: Mapping[str, float]) -> Outcome:
    side = requirement.right
    left, right = known[requirement.left], known[side] if isinstance(side, str) else side
    met = _COMPARISONS[requirement.comparison](left, right)
    margin = right - left if requirement.comparison.startswith("<") else left - right
    return Outcome(requirement, left, right, met, margin)


def _explain_unknown(name: str, known: Mapping[str, float]) -> str:
    whole = f"tuned/{name}"
    hint = f", did you mean {whole}?" if whole in known else suggest(name, known)
    if not hint:
        hint = f"; there are {listed(sorted(known), 10)}" if known else "; there are none at all"
    return f"there is no metric {quote(name)}{hint}"
