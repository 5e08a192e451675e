"""Check whether the metrics meet `evaluate.require` before a model is exported."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptj8.params.requirements import Requirement, parse_requirement
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import listed, quote, suggest

_STAGE = "evaluate"
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Outcome:
    """The result of checking a requirement.

    Attributes:
        requirement: the parsed requirement.
        left: value of the left side.
        right: value of the right side.
        met: whether the requirement is met; False if a side is NaN.
        margin: difference between the two sides; positive if the requirement is met by this amount,
            negative if it is missed, NaN if a side is NaN.
    """

    requirement: Requirement
    left: float
    right: float
    met: bool
    margin: float

    def __str__(self) -> str:
        values = f"{self.left:.6g} {self.requirement.comparison} {self.right:.6g}"
        if math.isnan(self.margin):
            ending = "cannot be met"
        elif self.met:
            ending = f"holds by {self.margin:.3g}"
        else:
            ending = f"misses by {abs(self.margin):.3g}"
        return f"{self.requirement} is {'met' if self.met else 'not met'}: {values} {ending}"


def check_requirements(
    requirements: Sequence[Requirement], metrics: Mapping[str, Mapping[str, float]]
) -> list[Outcome]:
    """Return the outcome of each requirement, in the given order.

    Args:
        requirements: parsed requirements.
        metrics: stage -> name -> value. A name is looked up in the stage `evaluate` first, then as
            `<stage>/<name>`, such as `finetune/eval_loss`.

    Raises:
        UserError: listing all unknown metrics, one per line.
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
    """Raise an error unless all requirements are met.

    Args:
        texts: requirements, such as `tuned/accuracy > 0.9`.
        metrics: see `check_requirements`.

    Raises:
        UserError: listing the requirements that are not met and their margins, one per line; see
            also `check_requirements`.
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
    full_name = f"tuned/{name}"
    hint = f", did you mean {full_name}?" if full_name in known else suggest(name, known)
    if not hint:
        hint = f"; available: {listed(sorted(known), 10)}" if known else "; no metrics available"
    return f"there is no metric {quote(name)}{hint}"
