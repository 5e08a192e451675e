"""Train from the beginning or from a checkpoint."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback

from gptj8.dataset.prepared.examples import Example, lengths_of
from gptj8.kernels import operators
from gptj8.model.adapters import trainable_parameters
from gptj8.runtime.distributed import (
    from_main,
    is_main_process,
    process_count,
    share_trained_only,
    summed,
)
from gptj8.runtime.errors import UserError
from gptj8.runtime.machine import is_out_of_memory
from gptj8.runtime.progress import format_seconds
from gptj8.training.activation_checkpointing import Kind, set_checkpointing
from gptj8.training.batches import Collator
from gptj8.training.best_state import BestState, choose_metric
from gptj8.training.heap import trimmed
from gptj8.training.loss import summed_loss
from gptj8.training.monitor import Monitor
from gptj8.training.packing import PackedCollator, require_packable
from gptj8.training.progress import TrainingProgress
from gptj8.training.saved_states import Saved, SavedStates
from gptj8.training.settings import (
    TrainingResult,
    TrainingSettings,
    autocast,
    training_arguments,
)
from gptj8.training.state import random_state, set_random_state
from gptj8.training.trainer import CompletionTrainer
from gptj8.training.trouble import TrainingDivergedError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


def train(
    model: PeftModel,
    train_examples: Sequence[Example] | Dataset,
    eval_examples: Sequence[Example] | Dataset,
    settings: TrainingSettings,
    pad_id: int,
    log: Callable[[dict[str, float], int], None] = lambda values, step: None,
    eval_accuracy: Callable[[PeftModel, int], float] | None = None,
    checkpoints: SavedStates | None = None,
) -> TrainingResult:
    """Train the adapter in place.

    Args:
        model: From `adapters.add_adapter`.
        train_examples, eval_examples: From `PreparedDataset.examples`, or a list of such examples.
        pad_id: Any token id; padding is masked by position.
        log: Called with values and step during training: `loss`, `learning_rate`, `grad_norm`,
            `eval_loss`, `eval_accuracy`, `tokens_per_second`. Resumed training first logs the
            values of the step that it resumes from.
        eval_accuracy: Measures the model in eval mode with the given batch size, whenever the
            validation loss is measured.
        checkpoints: Saved states of this training, to resume from. They are not removed here; the
            caller clears them after saving the result.

    Raises:
        TrainingDivergedError: If the loss is not finite or grows without bound.
        UserError: If training changed no weights, or micro-batch size 1 does not fit into memory.
    """
    untrained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    settings.require_more_than_warmup(len(train_examples))
    model.config.use_cache = False
    if settings.packing:
        require_packable(model)
    share_trained_only(model)
    if settings.max_eval_samples is not None:
        eval_examples = _first(eval_examples, settings.max_eval_samples)

    def attempt(settings: TrainingSettings, saved: Saved | None) -> TrainingResult:
        set_checkpointing(model, settings.checkpointing)
        size = settings.per_device_train_batch_size
        monitor = Monitor(log, eval_accuracy and (lambda model: eval_accuracy(model, size)))
        best = None
        if settings.keeps_best:
            metric = choose_metric(settings.metric_for_best_model, eval_accuracy is not None)
            best = BestState(monitor, metric, settings.early_stopping_patience)
        with (
            tempfile.TemporaryDirectory(prefix="gptj8-trainer-") as scratch,
            TrainingProgress(monitor) as shown,
            trimmed(model),
        ):
            trainer = CompletionTrainer(
                model=model,
                args=training_arguments(settings, scratch, model),
                train_dataset=train_examples,
                eval_dataset=eval_examples,
                data_collator=Collator(pad_id, model),
                callbacks=[monitor, shown],
                monitor=monitor,
                checkpoints=checkpoints,
                best=best,
                loraplus_lr_ratio=settings.loraplus_lr_ratio,
                packed_collator=PackedCollator(pad_id, model) if settings.packing else None,
            )
            trainer.remove_callback(PrinterCallback)
            result = _run(trainer, monitor, saved)
        _require_changed(model, untrained)
        if settings.load_best_model_at_end and best is not None:
            best.restore(model)
            result = replace(
                result,
                eval_loss=best.eval_loss,
                eval_accuracy=best.eval_accuracy,
                best_step=best.step,
            )
        return result

    tokens, learned = (int(counts.sum()) for counts in lengths_of(train_examples))
    result = _within_memory(attempt, model, untrained, settings, checkpoints)
    return replace(result, tokens=tokens, learned_tokens=learned)


def _require_changed(model: PeftModel, untrained: Mapping[str, torch.Tensor]) -> None:
    weights = dict(model.named_parameters())
    if all(torch.equal(weights[name], weight) for name, weight in untrained.items()):
        raise UserError("training changed no weights; finetune.learning_rate may be too small")


def _within_memory(
    attempt: Callable[[TrainingSettings, Saved | None], TrainingResult],
    model: PeftModel,
    untrained: Mapping[str, torch.Tensor],
    settings: TrainingSettings,
    checkpoints: SavedStates | None,
) -> TrainingResult:
    """Train, and continue with smaller micro-batches when memory runs out."""
    drawn = random_state()
    while True:
        saved = None if checkpoints is None else from_main(checkpoints.latest)
        if saved is not None:
            _print(f"resuming after step {saved.step}, saved {format_seconds(saved.age)} ago")
            # The larger size would run out of memory again, and other sizes round differently.
            settings = settings.divided(saved.content["per_device_train_batch_size"])
        try:
            return attempt(settings, saved)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # With several processes, their micro-batch sizes would no longer agree.
            if not is_out_of_memory(error) or process_count() > 1:
                raise
        smaller = settings.with_less_memory()
        if smaller is None:
            raise UserError(
                "out of memory at micro-batch size 1; lower data.max_length or finetune.r, or use "
                "a smaller model"
            )
        settings = smaller
        _print(
            "out of memory; continuing with a micro-batch size of "
            f"{settings.per_device_train_batch_size}, gradient accumulation "
            f"{settings.gradient_accumulation_steps}, checkpointing {settings.checkpointing}"
        )
        model.zero_grad(set_to_none=True)
        operators.drop_kept()
        gc.collect()  # reference cycles of the failed step still hold its tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in untrained:
                    weight.copy_(untrained[name])
        set_random_state(drawn)


def _run(trainer: CompletionTrainer, monitor: Monitor, saved: Saved | None) -> TrainingResult:
    """Train and evaluate; if training is interrupted, save a checkpoint."""
    args = trainer.args
    try:
        output = trainer.train_from(saved)
        if monitor.last_eval_step != trainer.state.global_step:
            trainer.evaluate()
    except BaseException as error:
        if _should_save(error):
            # A full disk must not hide the error that stopped training.
            with contextlib.suppress(UserError, OSError):
                folder = trainer.save()
                if folder is not None:
                    _print(f"saved a checkpoint after step {int(folder.name.split('-')[1])}")
        raise
    finally:
        trainer.release_signals()
        trainer.remove_noise()
    if not math.isfinite(monitor.eval_loss):
        raise TrainingDivergedError(f"the final validation loss is {monitor.eval_loss}")
    tokens, samples, padding = summed((monitor.tokens, monitor.samples, monitor.padding))
    return TrainingResult(
        train_loss=float(output.training_loss),
        eval_loss=monitor.eval_loss,
        eval_accuracy=monitor.eval_accuracy,
        best_step=None,
        tokens=0,
        learned_tokens=0,
        trainable_parameters=trainable_parameters(trainer.model),
        steps=trainer.state.global_step,
        seconds=trainer.seconds,
        tokens_per_second=tokens / monitor.step_seconds,
        samples_per_second=samples / monitor.step_seconds,
        padding_fraction=padding / max(1, padding + tokens),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        history=monitor.history,
    )


def _should_save(error: BaseException) -> bool:
    """Return whether the weights are valid after an error and useful to resume from."""
    if process_count() > 1:  # the processes may have stopped after different steps
        return False
    if isinstance(error, TrainingDivergedError):
        return error.weights_are_good
    return isinstance(error, KeyboardInterrupt | SystemExit) or is_out_of_memory(error)


def try_step(
    model: PeftModel, examples: Sequence[Example], checkpointing: Kind, packing: bool = False
) -> None:
    """Run forward and backward of one micro-batch as in training, to check that it fits.

    Leaves no gradients behind and does not advance random number generators.

    Raises:
        torch.OutOfMemoryError, RuntimeError or MemoryError: If it does not fit.
    """
    was_training = model.training
    batch = (PackedCollator if packing else Collator)(0, model)(examples)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.config.use_cache = False
    model.train()
    set_checkpointing(model, checkpointing)
    try:
        with torch.random.fork_rng(devices):
            with torch.autocast(**autocast(model)):
                total, _, _ = summed_loss(model, inputs)
            total.backward()
    finally:
        operators.drop_kept()
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _first(examples: Sequence[Example] | Dataset, count: int) -> Sequence[Example] | Dataset:
    if isinstance(examples, Sequence):
        return examples[:count]
    return examples.take(min(count, len(examples)))


def _print(text: str) -> None:
    if is_main_process():
        print(f"finetune: {text}", flush=True)
