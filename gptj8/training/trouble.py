"""Training that goes wrong: a loss that is no number, or grows without bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptj8.errors import UserError

_EXPLODED = 3.0
"""A mean loss of so many times that of a guess among all tokens has nothing of a model left."""


WAY_OUT = "look at those rows, or lower finetune.learning_rate or max_grad_norm"


class LossLost(UserError):
    """Training stopped because of its loss or gradients; the weights are those of the step before.

    Attributes:
        reason: what is lost, and at which step.
        examples: numbers of the examples of that step; empty if they are not known.
    """

    def __init__(self, reason: str, examples: Sequence[int] = ()) -> None:
        self.reason, self.examples = reason, list(examples)
        where = f" on examples {_listed(self.examples)}" if self.examples else ""
        super().__init__(f"{reason}{where}; {WAY_OUT}")


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:16]))
    return f"{shown} and {len(numbers) - 16} more" if len(numbers) > 16 else shown


def is_exploded(loss: float, vocabulary: int) -> bool:
    """Whether a mean loss, in nats a token, is that of a model that is no longer one."""
    return loss > _EXPLODED * math.log(vocabulary)
