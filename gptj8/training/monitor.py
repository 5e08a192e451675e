"""Measure speed, loss and accuracy during training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gptj8.runtime.distributed import process_count, process_number
from gptj8.runtime.machine import memory_gib
from gptj8.training.settings import autocast
from gptj8.training.trouble import TrainingDivergedError, is_exploded

if TYPE_CHECKING:
    from peft import PeftModel

_LOGGED = ("loss", "eval_loss", "grad_norm", "learning_rate")
_SUMS = ("positions", "step_seconds", "eval_loss", "eval_accuracy", "last_eval_step")


class Monitor(TrainerCallback):
    """Time training steps, record the loss, and stop training if the loss grows without bound.

    Args:
        log: Called with values and their step.
        measure_accuracy: Called with the model in eval mode whenever the validation loss is
            measured.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float], int], None],
        measure_accuracy: Callable[[PeftModel], float] | None,
    ) -> None:
        self.log = log
        self.eval_loss = math.nan
        self.eval_accuracy: float | None = None
        self.last_eval_step = -1
        self._measure_accuracy = measure_accuracy
        self.history: list[dict[str, float]] = []
        self.positions = 0
        # Tokens and samples, kept on the device: reading them would wait for the step.
        self._counts = torch.zeros(2, dtype=torch.int64)
        self.step_seconds = 0.0
        self._step_started = 0.0

    def count(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count one training batch; rows that are packed into one sequence are several samples."""
        mask, positions = inputs["attention_mask"], inputs.get("position_ids")
        is_first = mask[:, :1] if positions is None else mask * (positions == 0)
        counts = torch.stack([mask.sum(), is_first.sum()])
        self._counts = self._counts.to(mask.device) + counts
        self.positions += mask.numel()

    @property
    def samples(self) -> int:
        """Rows trained so far by this process."""
        return int(self._counts[1])

    @property
    def tokens(self) -> int:
        """Tokens trained so far by this process, without padding."""
        return int(self._counts[0])

    @property
    def padding(self) -> int:
        """Padding positions so far in the batches of this process."""
        return self.positions - self.tokens

    @property
    def tokens_per_second(self) -> float:
        """Mean over training steps so far; assumes that all processes have equally many tokens."""
        return self.tokens * process_count() / max(self.step_seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """Return the measurements so far, to resume from."""
        sums = {name: getattr(self, name) for name in _SUMS}
        return {"sums": sums, "counts": self._counts, "history": list(self.history)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the measurements that `state` returned."""
        for name, value in state["sums"].items():
            setattr(self, name, value)
        self._counts = state["counts"]
        self.history[:] = state["history"]

    def step_begins(self) -> None:
        """Restart the step timer, which excludes the time since the last step."""
        self._step_started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if process_count() > 1:  # each process needs its own dropout masks
            torch.manual_seed(args.seed + process_number())
        self.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.step_seconds += now - self._step_started
        self._step_started = now

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.last_eval_step = state.global_step
        if self._measure_accuracy is not None:
            model.eval()  # Trainer's next step switches back to train mode
            with torch.autocast(**autocast(model)):
                self.eval_accuracy = self._measure_accuracy(model)
            # Trainer has already logged the loss of this evaluation.
            self.history[-1]["eval_accuracy"] = self.eval_accuracy
            self.log({"eval_accuracy": self.eval_accuracy}, state.global_step)
        self.step_begins()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        values = {name: float(logs[name]) for name in _LOGGED if name in logs}
        if not values:
            return
        self.eval_loss = values.get("eval_loss", self.eval_loss)
        if "loss" in values:
            if is_exploded(values["loss"], model.config.vocab_size):
                raise TrainingDivergedError(
                    f"the loss grew to {values['loss']:.3g} at step {state.global_step}"
                )
            values["tokens_per_second"] = self.tokens_per_second
            values["memory_gib"] = memory_gib()
        self.log(values, state.global_step)
        self.history.append({"step": state.global_step, **values})
