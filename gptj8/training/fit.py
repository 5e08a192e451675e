"""Fit training into memory by choosing the micro-batch size and activation checkpointing.

An optimizer step uses `train_batch_size` sequences for every micro-batch size, and activation
checkpointing does not change results. So neither choice changes the trained weights by more than
rounding. The choice made from the estimate (`gptj8.memory.fitting`) is tried on the longest rows
before training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptj8.dataset.prepared.examples import lengths_of
from gptj8.runtime.machine import is_out_of_memory
from gptj8.training.activation_checkpointing import KINDS, Kind

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.dataset.prepared.examples import Example
    from gptj8.params.sections import Finetune


@dataclass(frozen=True)
class Fit:
    """Micro-batch size and kind of activation checkpointing."""

    micro_batch: int
    checkpointing: Kind


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def confirm(
    fit: Fit,
    finetune: Finetune,
    device: str,
    longest: Callable[[int], Sequence[Example]],
    try_step: Callable[[Sequence[Example], Kind], None],
) -> Fit:
    """Try a fit, and return it or one that needs less memory.

    If memory runs out, more activations are recomputed first; then the micro-batch size is reduced.
    Each is changed only if params set it to `auto`.

    Args:
        device: "cpu" or "cuda".
        longest: Returns the given number of the longest examples.
        try_step: Runs a step on them.
    """
    kinds = KINDS[device] if finetune.checkpointing == "auto" else ()
    is_chosen = finetune.per_device_train_batch_size == "auto"
    sizes = divisors(finetune.sequences_per_step) if is_chosen else ()
    while True:
        try:
            try_step(longest(fit.micro_batch), fit.checkpointing)
            return fit
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            less = smaller(fit, kinds, sizes) if is_out_of_memory(error) else None
            if less is None:
                raise
            fit = less
        if torch.cuda.is_available():  # outside `except`, where the error no longer holds tensors
            torch.cuda.empty_cache()


def smaller(fit: Fit, kinds: Sequence[Kind], sizes: Sequence[int]) -> Fit | None:
    """Return the next fit that needs less memory, or None.

    More is recomputed first, because the result stays byte-identical; then the micro-batch size is
    at least halved, which rounds differently.

    Args:
        kinds: Allowed kinds of checkpointing, from the fastest to the one with the least memory.
        sizes: Allowed micro-batch sizes.
    """
    if fit.checkpointing in kinds[:-1]:
        return Fit(fit.micro_batch, kinds[kinds.index(fit.checkpointing) + 1])
    halves = [size for size in sizes if 2 * size <= fit.micro_batch]
    return Fit(max(halves), fit.checkpointing) if halves else None


def longest_of(examples: Sequence[Example] | Dataset) -> Callable[[int], list[Example]]:
    """Return a function that returns the given number of the longest examples."""
    order = np.argsort(-lengths_of(examples)[0], kind="stable")
    return lambda count: [examples[int(index)] for index in order[:count]]
