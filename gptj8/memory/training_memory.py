"""What the finetune stage does with the estimate: it is written down, and `auto` follows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptj8.dataset.prepared.examples import lengths_of
from gptj8.memory import measured_speed, process_memory
from gptj8.memory.estimate import Estimator, plan_of
from gptj8.memory.fitting import USED, choose_fit
from gptj8.memory.skeleton import read_config
from gptj8.runtime import machine
from gptj8.runtime.distributed import from_main, is_main_process, process_count, processes_here
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.training.activation_checkpointing import Kind
from gptj8.training.fit import Fit, confirm, longest_of

if TYPE_CHECKING:
    from datasets import Dataset

    from gptj8.dataset.prepared.examples import Example
    from gptj8.params.sections import Params


class TrainingMemory:
    """The estimate of one training, made before its model is loaded.

    Args:
        params: as they are for this process.
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
            process = process_memory.measure_process_memory(self._dtype) if device == "cpu" else 0
            self._estimator = Estimator(plan, process)
            self._estimator.training(1)
        except Exception as error:  # a model whose step cannot be recorded can be trained yet
            self._estimator = None
            if params.finetune.per_device_train_batch_size == "auto":
                raise UserError(
                    f"finetune.per_device_train_batch_size: auto: the memory of this model cannot "
                    f"be estimated ({one_line(error)}); give a number"
                ) from error
            if is_main_process():
                print(f"warning: memory is not estimated: {one_line(error)}", file=sys.stderr)

    def fit(self, try_step: Callable[[Sequence[Example], Kind], None]) -> Fit:
        """Return how many sequences to take at a time, and what to compute again: what params say,
        or what fits.

        Args:
            try_step: runs a step on examples; called for what is chosen here, on a CPU for numbers
                of sequences alone.

        Raises:
            UserError: if not even one sequence at a time fits.
        """
        return from_main(lambda: self._fit(try_step))

    def _fit(self, try_step: Callable[[Sequence[Example], Kind], None]) -> Fit:
        finetune = self._finetune
        asked, kind = finetune.per_device_train_batch_size, finetune.checkpointing
        if asked != "auto" and kind != "auto":
            return Fit(asked, kind)
        if self._estimator is None:
            assert asked != "auto"
            return Fit(asked, "full")
        available = machine.available_bytes(self._device)
        if self._device == "cpu":  # the weights are pages of files, which all processes share
            shared = min(available, self._estimator.weights.base)
            available = shared + (available - shared) // processes_here()
        fit = choose_fit(self._estimator, finetune, int(USED * available))
        if asked == "auto" or self._device == "cuda":
            fit = confirm(fit, finetune, self._device, longest_of(self._examples), try_step)
        estimated = f"{self._gib(fit):.2f} of {available / 2**30:.2f} GiB"
        if asked == "auto":
            times = finetune.sequences_a_step // fit.micro_batch
            print(
                f"finetune: {fit.micro_batch} sequences at a time, {times} times an optimizer "
                f"step, checkpointing {fit.checkpointing} ({estimated})",
                flush=True,
            )
        else:
            print(f"finetune: checkpointing {fit.checkpointing} ({estimated})", flush=True)
        return fit

    def metrics(self, fit: Fit) -> dict[str, float]:
        """Return `estimated_memory_gib`, the peak of training; nothing if it cannot be told."""
        if self._estimator is None:
            return {}
        return {"estimated_memory_gib": self._gib(fit)}

    def calibrate(self, tokens_per_second: float, fit: Fit) -> None:
        """Keep how fast this machine trained.

        Args:
            tokens_per_second: of training steps, of all processes, padding included.
            fit: what it trained with.
        """
        if self._estimator is None:
            return
        flops = self._estimator.flops_per_token(fit.checkpointing)
        measured = measured_speed.Calibration(
            tokens_per_second / process_count() * flops, self._estimator.process
        )
        measured_speed.write(machine.device_name(self._device), self._dtype, measured)

    def _gib(self, fit: Fit) -> float:
        assert self._estimator is not None
        return self._estimator.training(fit.micro_batch, fit.checkpointing).total / 2**30
