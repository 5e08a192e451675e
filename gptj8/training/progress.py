"""Training as it goes, for people: instead of Trainer's bars, each refresh of which is a line of a
log, and its dicts of strings."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback

from gptj8.runtime.progress import Progress


class Measured(Protocol):
    """What is known of a training that is under way.

    Attributes:
        history: a dict for each time that something was logged; see `TrainingResult`.
        tokens_per_second: of training steps alone, padding not counted.
    """

    history: list[dict[str, float]]

    @property
    def tokens_per_second(self) -> float: ...


class TrainingProgress(TrainerCallback):
    """One bar of steps with loss, validation accuracy, tokens a second and the time left.

    In a log a line every half minute and one for each validation. Validation has a bar of its own
    while it lasts.

    A context manager, so that the bar is gone before an error is printed.

    Args:
        measured: looked at as it changes; to be told of each event before this is.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
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
        if self._validation is not None:  # its loss is what is logged: accuracy is measured next
            self._validation.close()
            self._validation = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.show(self._facts())
            self._training.tell()

    def _facts(self) -> str:
        """Return what was measured last, as it is shown."""
        measured = self._measured
        last = {key: value for point in measured.history for key, value in point.items()}
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
