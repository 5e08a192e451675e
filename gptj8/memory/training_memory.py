"""Use the memory estimate in stage finetune: resolve `auto` settings and report the estimate."""

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
    """Memory estimate of one training run, made before its model is loaded.

    Args:
        params: Params of this process.
        base: Directory of the converted model.
        dtype: Compute dtype.
        device: "cpu" or "cuda".
        examples: The training examples.
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
        except Exception as error:  # a model whose step cannot be recorded can still be trained
            self._estimator = None
            if params.finetune.per_device_train_batch_size == "auto":
                raise UserError(
                    f"finetune.per_device_train_batch_size = auto: the memory of this model cannot "
                    f"be estimated ({one_line(error)}); set a number"
                ) from error
            if is_main_process():
                print(f"warning: memory cannot be estimated: {one_line(error)}", file=sys.stderr)

    def fit(self, try_step: Callable[[Sequence[Example], Kind], None]) -> Fit:
        """Return the micro-batch size and kind of checkpointing that params set or that fit.

        Args:
            try_step: Runs a step on examples to try settings chosen here; on a CPU, called only if
                the micro-batch size is `auto`.

        Raises:
            UserError: If micro-batch size 1 does not fit.
        """
        return from_main(lambda: self._fit(try_step))

    def _fit(self, try_step: Callable[[Sequence[Example], Kind], None]) -> Fit:
        finetune = self._finetune
        requested, kind = finetune.per_device_train_batch_size, finetune.checkpointing
        if requested != "auto" and kind != "auto":
            return Fit(requested, kind)
        if self._estimator is None:
            assert requested != "auto"
            return Fit(requested, "full")
        try:
            available = machine.available_bytes(self._device)
        except UserError:
            if requested == "auto":
                raise UserError(
                    "finetune.per_device_train_batch_size = auto: this system does not report "
                    "free memory; set a number"
                ) from None
            return Fit(requested, "full")  # the safest choice
        if self._device == "cpu":  # processes share the memory-mapped weights
            shared = min(available, self._estimator.weights.base)
            available = shared + (available - shared) // processes_here()
        fit = choose_fit(self._estimator, finetune, int(USED * available))
        if requested == "auto" or self._device == "cuda":
            fit = confirm(fit, finetune, self._device, longest_of(self._examples), try_step)
        estimated = f"estimated {self._gib(fit):.2f} of {available / 2**30:.2f} GiB"
        if requested == "auto":
            accumulation = finetune.sequences_per_step // fit.micro_batch
            print(
                f"finetune: micro-batch size {fit.micro_batch}, gradient accumulation "
                f"{accumulation}, checkpointing {fit.checkpointing} ({estimated})",
                flush=True,
            )
        else:
            print(f"finetune: checkpointing {fit.checkpointing} ({estimated})", flush=True)
        return fit

    def metrics(self, fit: Fit) -> dict[str, float]:
        """Return `estimated_memory_gib`, the estimated peak of training; empty if unknown."""
        if self._estimator is None:
            return {}
        return {"estimated_memory_gib": self._gib(fit)}

    def calibrate(self, tokens_per_second: float, fit: Fit) -> None:
        """Save the training speed of this machine.

        Args:
            tokens_per_second: Speed of training steps, summed over processes, including padding.
            fit: The fit used in training.
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
