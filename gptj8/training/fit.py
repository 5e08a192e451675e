"""How a training is made to fit into memory: sequences at a time, and what is computed again.

An optimizer step sees `train_batch_size` sequences however they are split, and activation
checkpointing changes no result, so that neither choice changes what is learned by more than
rounding. What an estimate says (`gptj8.memory.fitting`) is tried on the longest rows before
training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptj8.dataset.prepared.examples import lengths_of
from gptj8.training.activation_checkpointing import KINDS, Kind

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.dataset.prepared.examples import Example
    from gptj8.params.sections import Finetune


@dataclass(frozen=True)
class Fit:
    """What to train with: sequences at a time, and the kind of checkpointing."""

    micro_batch: int
    checkpointing: Kind


def divisors(number: int) -> list[int]:
    """Return what divides a number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def confirm(
    fit: Fit,
    finetune: Finetune,
    device: str,
    longest: Callable[[int], Sequence[Example]],
    try_step: Callable[[Sequence[Example], Kind], None],
) -> Fit:
    """Try a fit and return it, or one that takes less: first more is computed again, then fewer
    sequences are taken at a time; each only where params leave the choice.

    Args:
        device: "cpu" or "cuda".
        longest: returns so many of the longest examples.
        try_step: runs a step on them.
    """
    while True:
        try:
            try_step(longest(fit.micro_batch), fit.checkpointing)
            return fit
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            smaller = _smaller(fit, finetune, KINDS[device]) if is_out_of_memory(error) else None
            if smaller is None:
                raise
            fit = smaller
        if torch.cuda.is_available():  # here: the error no longer holds on to the tensors
            torch.cuda.empty_cache()


def _smaller(fit: Fit, finetune: Finetune, kinds: Sequence[Kind]) -> Fit | None:
    if finetune.checkpointing == "auto" and fit.checkpointing != kinds[-1]:
        return Fit(fit.micro_batch, kinds[kinds.index(fit.checkpointing) + 1])
    if finetune.per_device_train_batch_size != "auto" or fit.micro_batch == 1:
        return None
    half = fit.micro_batch // 2
    sizes = divisors(finetune.sequences_a_step)
    return Fit(max(size for size in sizes if size <= half), fit.checkpointing)


def longest_of(examples: Sequence[Example] | Dataset) -> Callable[[int], list[Example]]:
    """Return what gives the longest examples, as many as it is asked for."""
    order = np.argsort(-lengths_of(examples)[0], kind="stable")
    return lambda count: [examples[int(index)] for index in order[:count]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, of a GPU or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)  # torch, of a CPU's
