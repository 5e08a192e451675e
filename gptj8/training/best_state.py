"""Keep the best state of the adapter that an evaluation has seen, and stop early.

The state is a copy of the trained weights, in memory and in the saved states of training. It is
taken after each evaluation that is better than all before, and put back at the end of training.
Trainer's `load_best_model_at_end` was rejected because it needs Trainer's checkpoints, which are
pickles and not written atomically, and `EarlyStoppingCallback` because it knows nothing of the
accuracy, which is measured after Trainer's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from gptj8.runtime.distributed import from_main
from gptj8.training.monitor import Monitor

Metric = Literal["eval_accuracy", "eval_loss"]


class BestState(TrainerCallback):
    """Copies the trained weights whenever an evaluation finds them better than before.

    Adds an evaluation at the end of each epoch, so that short training has states to choose from.
    Must be registered after the monitor, whose measurements it reads.

    Args:
        monitor: Measures loss and accuracy.
        metric: A higher accuracy or a lower loss is better. With equal accuracies, the lower loss
            is better; otherwise the earlier state stays.
        patience: Stop training after this many evaluations in a row without a better metric. None:
            never stop.

    Attributes:
        step: Step after which the best state was measured; 0 before the first evaluation.
        eval_loss, eval_accuracy: Its measurements.
    """

    def __init__(self, monitor: Monitor, metric: Metric, patience: int | None) -> None:
        self.step = 0
        self.eval_loss: float = math.nan
        self.eval_accuracy: float | None = None
        self._monitor, self._metric, self._patience = monitor, metric, patience
        self._without_better = 0
        self._weights: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Return the best state, its measurements and the patience spent, to resume from.

        The weights are not copied; they do not change later.
        """
        return {
            "step": self.step,
            "eval_loss": self.eval_loss,
            "eval_accuracy": self.eval_accuracy,
            "without_better": self._without_better,
            "weights": self._weights,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.step, self.eval_loss = state["step"], state["eval_loss"]
        self.eval_accuracy = state["eval_accuracy"]
        self._without_better = state["without_better"]
        self._weights = state["weights"]

    @torch.no_grad()
    def restore(self, model: torch.nn.Module) -> None:
        """Set the trained weights of a model to the best state."""
        weights = dict(model.named_parameters())
        for name, best in self._weights.items():
            weights[name].copy_(best)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if float(state.epoch).is_integer():
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        monitor = self._monitor
        found = {"eval_loss": monitor.eval_loss, "eval_accuracy": monitor.eval_accuracy}
        # Processes must not choose differently.
        is_better, is_better_in_metric = from_main(lambda: self._compare(found))
        self._without_better = 0 if is_better_in_metric else self._without_better + 1
        if is_better:
            self.step = state.global_step
            self.eval_loss, self.eval_accuracy = monitor.eval_loss, monitor.eval_accuracy
            self._weights = {
                name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
            }
        if self._patience is not None and self._without_better >= self._patience:
            control.should_training_stop = True

    def _compare(self, found: Mapping[str, float | None]) -> tuple[bool, bool]:
        """Return whether a state is better than the best one, and whether its metric is better."""
        if not self._weights:
            return True, True
        best = {"eval_loss": self.eval_loss, "eval_accuracy": self.eval_accuracy}
        ranks = [
            (_rank(self._metric, values), _rank("eval_loss", values)) for values in (found, best)
        ]
        return ranks[0] > ranks[1], ranks[0][0] > ranks[1][0]


def choose_metric(wanted: str, measures_accuracy: bool) -> Metric:
    """Return the metric of the best state, with `auto` resolved.

    Raises:
        ValueError: If the accuracy is wanted but not measured.
    """
    if wanted == "auto":
        return "eval_accuracy" if measures_accuracy else "eval_loss"
    if wanted == "eval_accuracy" and not measures_accuracy:
        raise ValueError("metric_for_best_model = eval_accuracy, but no accuracy is measured")
    return "eval_loss" if wanted == "eval_loss" else "eval_accuracy"


def _rank(metric: str, values: Mapping[str, float | None]) -> float:
    """Return a number that is higher for a better value; NaN and None are the worst."""
    value = values[metric]
    if value is None or math.isnan(value):
        return -math.inf
    return value if metric == "eval_accuracy" else -value
