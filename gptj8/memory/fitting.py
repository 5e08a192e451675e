"""What fits, by the estimate: how many sequences to train at a time, and what to compute again.

What is chosen here is tried before training (`gptj8.training.fit`): on a GPU what does not fit
after all is made smaller. A CPU has no error to catch, because the system ends the process; there a
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
"""Share of the free memory that may be filled: estimates are right to a tenth."""
# Share of that which may be spent on computing less again: a CPU's memory is everybody's.
_FOR_SPEED = {"cpu": 0.5, "cuda": 1.0}
# With so many tokens at a time restoring the weights is a small part of a step, and more sequences
# at a time are worth less than computing nothing again.
_ENOUGH_TOKENS = 2048


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
