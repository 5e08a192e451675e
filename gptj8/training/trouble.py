"""Errors of training whose loss is NaN or infinite, or grows without bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from gptj8.dataset.prepared.dataset import PreparedDataset

_EXPLODED = 3.0
"""A mean loss of this many times the loss of a uniform guess means that the model is destroyed."""


_MAX_SHOWN = 16
_ADVICE = "check the rows, or lower finetune.learning_rate or max_grad_norm"


class TrainingDivergedError(UserError):
    """Training stopped because of its loss or gradients.

    Attributes:
        reason: Which value is invalid, and at which step.
        examples: Numbers of the examples of that step; empty if unknown.
        weights_are_good: Whether the weights are still those of the previous step.
    """

    def __init__(
        self, reason: str, examples: Sequence[int] = (), weights_are_good: bool = False
    ) -> None:
        self.reason, self.examples = reason, list(examples)
        self.weights_are_good = weights_are_good
        super().__init__(self.told([str(number) for number in self.examples], "examples "))

    def told(self, names: Sequence[str], kind: str = "") -> str:
        """Return the message with the names of the examples, if known."""
        where = f" on {kind}{_shorten(names)}" if names else ""
        return f"{self.reason}{where}; {_ADVICE}"


@contextmanager
def naming_rows(dataset: PreparedDataset) -> Iterator[None]:
    """Convert TrainingDivergedError to an error that names the rows of the user's files.

    Args:
        dataset: The dataset that is trained on.

    Raises:
        UserError: In place of TrainingDivergedError.
    """
    try:
        yield
    except TrainingDivergedError as error:
        if dataset.task == "text" or not error.examples:  # a text example spans many rows
            raise UserError(str(error)) from None
        sources = dataset.examples("train").select(error.examples)["source_row"]
        rows = dataset.split("train").iloc[list(dict.fromkeys(sources))]
        names = [f"{f}:{r}" for f, r in zip(rows["file"], rows["row"], strict=True)]
        raise UserError(error.told(names)) from None


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_SHOWN])
    return f"{shown} and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else shown


def is_exploded(loss: float, vocabulary: int) -> bool:
    """Return whether a mean loss, in nats per token, shows that the model is destroyed."""
    return loss > _EXPLODED * math.log(vocabulary)
