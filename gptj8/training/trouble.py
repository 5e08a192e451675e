"""Training that goes wrong: a loss that is no number, or grows without bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from gptj8.dataset.prepared.dataset import PreparedDataset

_EXPLODED = 3.0
"""A mean loss of so many times that of a guess among all tokens has nothing of a model left."""


_SHOWN = 16
_WAY_OUT = "look at those rows, or lower finetune.learning_rate or max_grad_norm"


class TrainingDivergedError(UserError):
    """Training stopped because of its loss or gradients.

    Attributes:
        reason: what is lost, and at which step.
        examples: numbers of the examples of that step; empty if they are not known.
        weights_are_good: whether the weights are still those of the step before.
    """

    def __init__(
        self, reason: str, examples: Sequence[int] = (), weights_are_good: bool = False
    ) -> None:
        self.reason, self.examples = reason, list(examples)
        self.weights_are_good = weights_are_good
        super().__init__(self.told([str(number) for number in self.examples], "examples "))

    def told(self, names: Sequence[str], kind: str = "") -> str:
        """Return the message with the examples called by names, where they are known."""
        where = f" on {kind}{_few(names)}" if names else ""
        return f"{self.reason}{where}; {_WAY_OUT}"


@contextmanager
def naming_rows(dataset: PreparedDataset) -> Iterator[None]:
    """Name the rows of the user's files that a training of `dataset` diverged on.

    Raises:
        UserError: in place of TrainingDivergedError.
    """
    try:
        yield
    except TrainingDivergedError as error:
        if dataset.task == "text" or not error.examples:  # an example is then of many rows
            raise UserError(str(error)) from None
        rows = dataset.split("train").iloc[error.examples]
        names = [f"{f}:{r}" for f, r in zip(rows["file"], rows["row"], strict=True)]
        raise UserError(error.told(names)) from None


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def is_exploded(loss: float, vocabulary: int) -> bool:
    """Whether a mean loss, in nats a token, is that of a model that is no longer one."""
    return loss > _EXPLODED * math.log(vocabulary)
