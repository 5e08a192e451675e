"""Training examples: token ids and the spans of tokens that are learned.

Only answers have a loss: the completion of a prompt, or the answers in a conversation. Other tokens
and padding are masked by position and not by the padding token's id: where padding is the
end-of-text token, masking by id would also mask the end of an answer, and the model would never
learn to stop. Running text has no prompt, so every token has a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""`input_ids` (a list of int), `learned` (start and end of each learned span, in a flat list) and
`length`."""


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


def learned_spans(example: Example) -> Iterator[slice]:
    """Yield the spans of `input_ids` that have a loss, in order."""
    ends = iter(example["learned"])
    return (slice(start, end) for start, end in zip(ends, ends, strict=True))


def prompt_ids(example: Example) -> list[int]:
    """Return the ids before the last answer; for running text, all ids."""
    ids = example["input_ids"]
    *_, last = learned_spans(example)
    return ids[: last.start] or ids


def learned_tokens(learned: Sequence[int]) -> int:
    """Return the number of tokens with a loss, given the spans of an example."""
    # The first token has no loss, because nothing precedes it.
    return sum(learned[1::2]) - sum(learned[::2]) - (1 if learned and learned[0] == 0 else 0)


def lengths_of(examples: Sequence[Example] | Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return per example the number of tokens and the number of tokens with a loss."""
    if isinstance(examples, Sequence):
        lengths = [len(example["input_ids"]) for example in examples]
        learned = [learned_tokens(example["learned"]) for example in examples]
    else:
        columns: Any = examples
        lengths, learned = columns["length"], columns["learned_tokens"]
    return np.asarray(lengths, dtype=np.int64), np.asarray(learned, dtype=np.int64)
