"""Show the progress of training.

Replaces Trainer's progress bars, which add a line to a log on every refresh, and its printed dicts.
"""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback

from gptj8.runtime.progress import Progress


class Measured(Protocol):
    """Measurements of running training.

    Attributes:
        history: One dict per logged event; see `TrainingResult`.
        tokens_per_second: Speed of training steps, without padding.
    """

    history: list[dict[str, float]]

    @property
    def tokens_per_second(self) -> float: ...


class TrainingProgress(TrainerCallback):
    """Show a bar of steps with loss, validation accuracy, tokens per second and the time left.

    In a log, prints one line every 30 seconds and one per validation. Each validation has its own
    bar.

    A context manager, so that the bar is removed before an error is printed.

    Args:
        measured: Measurements, read on each event; its callback must be registered before this one.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._last: dict[str, float] = {}
        self._read = 0  # points of the history that are in `_last`
        self._training: Progress | None = None
        self._validation: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for shown in (self._validation, self._training):
            if shown is not None:
                shown.close(is_complete=kind is None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = Progress(state.max_steps, "training", "steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.show(self._facts())
            self._training(state.global_step - self._training.done)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._validation is None:
            self._validation = Progress(len(eval_dataloader), "validation loss", "batches")
        self._validation()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._validation is not None:  # the validation loss is logged; accuracy comes next
            self._validation.close()
            self._validation = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.show(self._facts())
            self._training.tell()

    def _facts(self) -> str:
        """Return the latest measurements as text."""
        measured, last = self._measured, self._last
        self._read = min(self._read, len(measured.history))  # shorter after a step was repeated
        for point in measured.history[self._read :]:
            last |= point
        self._read = len(measured.history)
        parts = []
        if "loss" in last:
            parts.append(f"loss {last['loss']:.3f}")
        if "eval_accuracy" in last:
            parts.append(f"accuracy {last['eval_accuracy']:.1%}")
        elif "eval_loss" in last:
            parts.append(f"validation loss {last['eval_loss']:.3f}")
        if measured.tokens_per_second:
            parts.append(f"{measured.tokens_per_second:,.0f} tokens/s")
        return ", ".join(parts)
