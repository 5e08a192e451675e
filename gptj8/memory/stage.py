"""What the finetune stage does with the estimate: it is written down, and `auto` follows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptj8.errors import UserError
from gptj8.memory import calibration, machine
from gptj8.memory.auto_batch import USED, choose_micro_batch, confirm, lengths_of, longest_of
from gptj8.memory.estimate import Estimator, plan_of
from gptj8.memory.skeleton import read_config
from gptj8.words import one_line

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.examples import Example
    from gptj8.params import Params


class TrainingMemory:
    """The estimate of one training, made before its model is loaded.

    Args:
        params: with its `finetune` section.
        base: directory of the converted model.
        dtype: of the arithmetic.
        device: "cpu" or "cuda".
        examples: what is trained on.
    """

    def __init__(
        self,
        params: Params,
        base: Path,
        dtype: torch.dtype,
        device: str,
        examples: Sequence[Example] | Dataset,
    ) -> None:
        self._finetune, self._examples = params.finetune, examples
        self._device, self._dtype = device, str(dtype).removeprefix("torch.")
        self._estimator: Estimator | None = None
        lengths, learned = lengths_of(examples)
        try:
            plan = plan_of(
                params, read_config(base), dtype, device, int(lengths.max()), int(learned.max())
            )
            process = machine.process_bytes(self._dtype) if device == "cpu" else 0
            self._estimator = Estimator(plan, process)
            self._estimator.training(1)
        except Exception as error:  # a model whose step cannot be recorded can be trained yet
            self._estimator = None
            if params.finetune.per_device_train_batch_size == "auto":
                raise UserError(
                    f"finetune.per_device_train_batch_size: auto: the memory of this model cannot "
                    f"be estimated ({one_line(error)}); give a number"
                ) from error
            print(f"warning: memory is not estimated: {one_line(error)}", file=sys.stderr)

    def batch_sizes(self, try_step: Callable[[Sequence[Example]], None]) -> dict[str, int]:
        """Return `per_device_train_batch_size` and `gradient_accumulation_steps`: what params say,
        or what fits.

        Args:
            try_step: runs a step on examples; called for `auto` only.

        Raises:
            UserError: if not even one sequence at a time fits.
        """
        finetune, a_step = self._finetune, self._finetune.sequences_a_step
        micro = finetune.per_device_train_batch_size
        if micro == "auto":
            assert self._estimator is not None
            available = machine.available_bytes(self._device)
            chosen = choose_micro_batch(self._estimator, a_step, int(USED * available))
            micro = confirm(chosen, a_step, longest_of(self._examples), try_step)
            print(
                f"finetune: {micro} sequences at a time, {a_step // micro} times an optimizer "
                f"step ({self._gib(micro):.2f} of {available / 2**30:.2f} GiB)",
                flush=True,
            )
        return {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": a_step // micro,
        }

    def metrics(self, micro_batch: int) -> dict[str, float]:
        """Return `estimated_memory_gib`, the peak of training; nothing if it cannot be told."""
        if self._estimator is None:
            return {}
        return {"estimated_memory_gib": self._gib(micro_batch)}

    def calibrate(self, tokens_per_second: float) -> None:
        """Keep how fast this machine trained.

        Args:
            tokens_per_second: of training steps, padding included.
        """
        if self._estimator is None:
            return
        measured = calibration.Calibration(
            tokens_per_second * self._estimator.flops_per_token(), self._estimator.process
        )
        calibration.write(machine.device_name(self._device), self._dtype, measured)

    def _gib(self, micro_batch: int) -> float:
        assert self._estimator is not None
        return self._estimator.training(micro_batch).total / 2**30
