"""How many sequences to train at a time: as many as fit, without a change to what is learned.

An optimizer step sees `train_batch_size` sequences however they are split, so that only rounding
depends on the split. What the estimate says is tried on the longest rows before training: on a GPU
what does not fit after all is halved. A CPU has no error to catch, because the system ends the
process; there a tenth of the memory is left free instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptj8.errors import UserError
from gptj8.files import format_bytes
from gptj8.memory.estimate import Estimator

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.examples import Example

USED = 0.9
"""Share of the memory that may be filled: estimates are right to a tenth."""


def divisors(number: int) -> list[int]:
    """Return what divides a number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def choose_micro_batch(estimator: Estimator, train_batch_size: int, memory: int) -> int:
    """Return the largest divisor of `train_batch_size` whose training fits into `memory` bytes.

    Raises:
        UserError: if not even one sequence does.
    """
    chosen = estimator.largest_micro_batch(memory, divisors(train_batch_size))
    if not chosen:
        needed = estimator.training(1).total
        raise UserError(
            f"training needs {format_bytes(needed)} for one sequence of {estimator.plan.length} "
            f"tokens, and {format_bytes(memory)} may be used; lower data.max_length, switch "
            "finetune.gradient_checkpointing on, or set finetune.per_device_train_batch_size to 1 "
            "to try it all the same"
        )
    return chosen


def confirm(
    micro_batch: int,
    train_batch_size: int,
    longest: Callable[[int], Sequence[Example]],
    try_step: Callable[[Sequence[Example]], None],
) -> int:
    """Try a micro-batch and return it, or a smaller divisor of `train_batch_size` that fits.

    Args:
        longest: returns so many of the longest examples.
        try_step: runs a step on them.
    """
    while True:
        try:
            try_step(longest(micro_batch))
            return micro_batch
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if micro_batch == 1 or not _is_out_of_memory(error):
                raise
            half = micro_batch // 2
            micro_batch = max(d for d in divisors(train_batch_size) if d <= half)
        if torch.cuda.is_available():  # here: the error no longer holds on to the tensors
            torch.cuda.empty_cache()


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


def longest_of(examples: Sequence[Example] | Dataset) -> Callable[[int], list[Example]]:
    """Return what gives the longest examples, as many as it is asked for."""
    order = np.argsort(-lengths_of(examples)[0], kind="stable")
    return lambda count: [examples[int(index)] for index in order[:count]]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)  # torch, of a CPU's
