"""Training examples: token ids and the number of leading prompt tokens without loss.

Only completion tokens have a loss. Prompt tokens and padding are masked by position and not by the
padding token's id: where padding is the end-of-text token, masking by id would also mask the end of
the completion, and the model would never learn to stop. Running text has no prompt, so every token
has a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token without loss; torch's default `ignore_index`."""

PADDED_TO = 16
"""On a CPU, training batches are padded to a multiple of this many tokens. oneDNN compiles a kernel
for each new length, which takes a millisecond or more and made the default model a fifth slower."""

Example = Mapping[str, Any]
"""`input_ids` (a list of int), `prompt_length` (leading tokens without loss) and `length`."""


def padded_length(length: int, context: int, device: str) -> int:
    """Return the padded length of a batch whose rows differ in length.

    Args:
        length: tokens of the longest row.
        context: the model's number of positions.
        device: "cpu" rounds up to a multiple of `PADDED_TO`; other devices do not benefit.
    """
    if device != "cpu":
        return length
    return max(length, min(-(-length // PADDED_TO) * PADDED_TO, context))


def prompt_ids(example: Example) -> list[int]:
    """Return the ids of the prompt; for running text, all ids."""
    ids = example["input_ids"]
    return ids[: example["prompt_length"]] or ids


def lengths_of(examples: Sequence[Example] | Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return per example the number of tokens and the number of tokens with a loss."""
    if isinstance(examples, Sequence):
        lengths = [len(example["input_ids"]) for example in examples]
        prompts = [example["prompt_length"] for example in examples]
    else:
        columns: Any = examples
        lengths, prompts = columns["length"], columns["prompt_length"]
    tokens = np.asarray(lengths, dtype=np.int64)
    # The first token has no loss, because nothing precedes it.
    return tokens, tokens - np.maximum(np.asarray(prompts, dtype=np.int64), 1)
