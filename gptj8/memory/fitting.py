"""Choose the micro-batch size and activation checkpointing that fit by the estimate.

The choice is tried before training (`gptj8.training.fit`), and on a GPU it is reduced if it does
not fit. On a CPU there is no error to catch, because the operating system kills the process, so a
tenth of the memory is left free instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptj8.memory.estimate import Estimator
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes
from gptj8.training.activation_checkpointing import KINDS
from gptj8.training.fit import Fit, divisors

if TYPE_CHECKING:
    from gptj8.params.sections import Finetune

USED = 0.9
"""Fraction of the free memory that may be used, because estimates are accurate to 10%."""
# Fraction of the usable memory that may be spent to avoid recomputation. On a CPU, other programs
# need memory too.
_FOR_SPEED = {"cpu": 0.5, "cuda": 1.0}
# With this many tokens per micro-batch, dequantization is a small part of a step, and avoiding
# recomputation saves more time than larger micro-batches.
_ENOUGH_TOKENS = 2048


def choose_fit(estimator: Estimator, finetune: Finetune, memory: int) -> Fit:
    """Return the fit that params set; for `auto`, choose the fastest that fits.

    Args:
        estimator: Estimator of the training that `finetune` describes.
        finetune: The `finetune` section of params.
        memory: Bytes that may be used.

    Raises:
        UserError: If the micro-batch size is `auto` and not even 1 fits.
    """
    requested, per_step = finetune.per_device_train_batch_size, finetune.sequences_per_step
    sizes = divisors(per_step) if requested == "auto" else [requested]
    device = estimator.plan.device
    kinds = list(KINDS[device]) if finetune.checkpointing == "auto" else [finetune.checkpointing]
    last = kinds.pop()
    length = estimator.plan.length
    enough = next((size for size in sizes if size * length >= _ENOUGH_TOKENS), sizes[-1])
    for kind in kinds:
        limit = int(_FOR_SPEED[device] * memory)
        try:
            fitting = estimator.largest_micro_batch(limit, sizes, kind)
        except RuntimeError:  # selective: torch cannot keep outputs that a model changes in place
            continue
        if fitting >= enough:
            return Fit(fitting, kind)
    if requested != "auto":
        return Fit(requested, last)
    fitting = estimator.largest_micro_batch(memory, sizes, last)
    if fitting:
        return Fit(fitting, last)
    needed = estimator.training(1, last).total
    recompute = "" if last == "full" else "set finetune.checkpointing to auto or full, "
    raise UserError(
        f"training needs {format_bytes(needed)} for one sequence of {length} tokens, and only "
        f"{format_bytes(memory)} can be used; lower data.max_length, {recompute}or set "
        "finetune.per_device_train_batch_size to 1 to try anyway"
    )
