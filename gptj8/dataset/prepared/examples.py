"""What a model is trained on: token ids, and how many of the first are not learned.

Only the completion is learned: the loss of prompt tokens is masked, by position and not by the
padding token's id, because where padding is the end-of-text token a model that never sees its end
never learns to stop. Running text has no prompt: every token is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token that is not learned, by torch's convention."""

PADDED_TO = 16
"""Rows of a training batch on a CPU are padded to a multiple of so many tokens: oneDNN compiles a
product anew for each length, for a millisecond or more, which made the default model a fifth
slower."""

Example = Mapping[str, Any]
"""`input_ids` (a list of int), `prompt_length` (the first so many are not learned) and `length`."""


def padded_length(length: int, context: int, device: str) -> int:
    """Return the tokens of a batch of rows that differ, the longest with `length`.

    Args:
        length: tokens of the longest row.
        context: positions that the model has.
        device: "cpu" or another, which gains nothing from it.
    """
    if device != "cpu":
        return length
    return max(length, min(-(-length // PADDED_TO) * PADDED_TO, context))


def prompt_ids(example: Example) -> list[int]:
    """Return the ids before the first one that is learned; all of them for running text."""
    ids = example["input_ids"]
    return ids[: example["prompt_length"]] or ids


def lengths_of(examples: Sequence[Example] | Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's tokens, and how many of them are learned."""
    if isinstance(examples, Sequence):
        lengths = [len(example["input_ids"]) for example in examples]
        prompts = [example["prompt_length"] for example in examples]
    else:
        columns: Any = examples
        lengths, prompts = columns["length"], columns["prompt_length"]
    tokens = np.asarray(lengths, dtype=np.int64)
    # Nothing predicts the first token.
    return tokens, tokens - np.maximum(np.asarray(prompts, dtype=np.int64), 1)
