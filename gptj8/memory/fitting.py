"""What fits: how many sequences to train at a time, and how little of them to compute again.

An optimizer step sees `train_batch_size` sequences however they are split, and checkpointing
changes no result, so that neither choice changes what is learned by more than rounding. What the
estimate says is tried on the longest rows before training: on a GPU what does not fit after all is
made smaller. A CPU has no error to catch, because the system ends the process; there a tenth of the
memory is left free instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptj8.checkpointing import KINDS, Kind
from gptj8.dataset.prepared.examples import lengths_of
from gptj8.memory.estimate import Estimator
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.dataset.prepared.examples import Example
    from gptj8.params.sections import Finetune

USED = 0.9
"""Share of the free memory that may be filled: estimates are right to a tenth."""
# Share of that which may be spent on computing less again: a CPU's memory is everybody's.
_FOR_SPEED = {"cpu": 0.5, "cuda": 1.0}
# With so many tokens at a time restoring the weights is a small part of a step, and more sequences
# at a time are worth less than computing nothing again.
_ENOUGH_TOKENS = 2048


@dataclass(frozen=True)
class Fit:
    """What to train with: sequences at a time, and the kind of checkpointing."""

    micro_batch: int
    checkpointing: Kind


def choose_fit(estimator: Estimator, finetune: Finetune, memory: int) -> Fit:
    """Return what params say, and where they say `auto`, the fastest that fits.

    Args:
        estimator: of the training that `finetune` describes.
        memory: bytes that may be filled.

    Raises:
        UserError: if the sequences are to be chosen and not even one at a time fits.
    """
    asked, a_step = finetune.per_device_train_batch_size, finetune.sequences_a_step
    sizes = divisors(a_step) if asked == "auto" else [asked]
    device = estimator.plan.device
    kinds = list(KINDS[device]) if finetune.checkpointing == "auto" else [finetune.checkpointing]
    last = kinds.pop()
    length = estimator.plan.length
    enough = next((size for size in sizes if size * length >= _ENOUGH_TOKENS), sizes[-1])
    for kind in kinds:
        limit = int(_FOR_SPEED[device] * memory)
        try:
            fitting = estimator.largest_micro_batch(limit, sizes, kind)
        except RuntimeError:  # torch cannot keep what a model changes in place
            continue
        if fitting >= enough:
            return Fit(fitting, kind)
    if asked != "auto":
        return Fit(asked, last)
    fitting = estimator.largest_micro_batch(memory, sizes, last)
    if fitting:
        return Fit(fitting, last)
    needed = estimator.training(1, last).total
    recompute = "" if last == "full" else "set finetune.checkpointing to auto or full, "
    raise UserError(
        f"training needs {format_bytes(needed)} for one sequence of {length} tokens, and "
        f"{format_bytes(memory)} may be used; lower data.max_length, {recompute}or set "
        "finetune.per_device_train_batch_size to 1 to try it all the same"
    )


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
