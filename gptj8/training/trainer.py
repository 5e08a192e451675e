"""Extend transformers' Trainer with a loss over completions only and with resumable checkpoints."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from gptj8.runtime.distributed import each_a_share, from_main, process_count, process_number
from gptj8.training.batches import RowOrder
from gptj8.training.best_state import BestState
from gptj8.training.loss import summed_loss
from gptj8.training.monitor import Monitor
from gptj8.training.packing import PackedCollator
from gptj8.training.saved_states import Saved, SavedStates
from gptj8.training.signals import HeldSignals
from gptj8.training.state import (
    optimizer_state,
    random_state,
    set_optimizer_state,
    set_random_state,
)
from gptj8.training.trouble import TrainingDivergedError


class CompletionTrainer(Trainer):
    """A Trainer that computes logits only at learned tokens and can resume exactly.

    The head is a fifth of the arithmetic of a small model, and the float32 logits of a prompt are
    the largest tensors of a large model. Logits of prompt and padding tokens are not needed.

    The saved state is the one at the end of a step, before the logging and evaluation that are due
    at that step; resumed training begins with these. Weights and optimizer change only in the
    update at the end of the next step, during which SIGINT and SIGTERM are delayed. So `save` can
    write a consistent state at any time, even during an evaluation that takes an hour.

    Args:
        monitor: Measurements; part of the state.
        best: The best state so far, part of the state; None: it is not kept.
        loraplus_lr_ratio: Learning rate of LoRA's B over that of A; None: equal.
        packed_collator: Collates training batches; None: as validation batches.
        checkpoints: Where states are saved; None: they are not saved.
        arguments: Arguments of `Trainer`.
    """

    # Trainer sets these before the first step; its own type hints allow None.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        monitor: Monitor,
        checkpoints: SavedStates | None,
        best: BestState | None = None,
        loraplus_lr_ratio: float | None = None,
        packed_collator: PackedCollator | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._monitor, self._checkpoints, self._best = monitor, checkpoints, best
        self._lr_ratio, self._packed_collator = loraplus_lr_ratio, packed_collator
        if best is not None:
            self.add_callback(best)
        self._rows: RowOrder | None = None
        self._last: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._held = HeldSignals()
        self._begun = time.perf_counter()
        self._unchecked: list[tuple[int, torch.Tensor]] = []
        self.add_callback(_Hooks(self))

    @property
    def seconds(self) -> float:
        """Seconds of training, without the time between interrupted attempts."""
        return time.perf_counter() - self._begun

    # Rows of a step and their loss.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        total, learned, outputs = summed_loss(model, inputs)
        # With gradient accumulation, Trainer counts the learned tokens of all micro-batches.
        count = learned if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        # The count covers all processes, and gradients are averaged over processes.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self._monitor.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "loss")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # scaled ones may be infinite
            self._check_finite(torch.as_tensor(norm), "norm of the gradients")
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        processes = self.accelerator.num_processes
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
        self._rows = RowOrder(rows, step, self.args.seed)
        return self._rows

    def get_train_dataloader(self) -> Any:
        # Validation batches are not packed: Trainer weighs their losses by their sequences.
        collator = self.data_collator
        self.data_collator = self._packed_collator or collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, that determines the order of rows."""
        if self._rows is not None:
            self._rows.epoch = epoch

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        # Resumed after the last step, or where training stops early.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self._lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        model = self.model if model is None else model
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=self._lr_ratio,
            loraplus_lr_embedding=self.args.learning_rate,
            loraplus_weight_decay=self.args.weight_decay,
            **arguments,
        )
        return self.optimizer

    def remove_noise(self) -> None:
        """Remove NEFTune's hook, which Trainer leaves on the model if training raised an error."""
        hook = getattr(self, "neftune_hook_handle", None)
        if hook is not None and self.is_in_train:
            hook.remove()
            del self.model.get_base_model().get_input_embeddings().neftune_noise_alpha

    # A loss of NaN or infinity.

    def _check_finite(self, value: torch.Tensor, what: str) -> None:
        """Raise an error before a NaN or infinite value changes the weights.

        On a GPU the check would wait for the step, so it is deferred until the loss is logged.
        """
        value, step = value.detach(), self.state.global_step
        if value.device.type != "cpu":
            self._unchecked.append((step, value))
        elif not bool(torch.isfinite(value)):
            self._raise_diverged(f"the {what} is {float(value)}", step, weights_are_good=True)

    def _check_deferred(self) -> None:
        """Run the deferred checks."""
        if not self._unchecked:
            return
        unchecked, self._unchecked = self._unchecked, []
        finite = torch.isfinite(torch.stack([value.float() for _, value in unchecked])).tolist()
        if not all(finite):
            step, value = unchecked[finite.index(False)]
            what = f"the loss or the norm of its gradients is {float(value)}"
            self._raise_diverged(what, step, weights_are_good=False)

    def _raise_diverged(self, what: str, step: int, weights_are_good: bool) -> None:
        examples = [] if self._rows is None else self._rows.rows_of_step(step)
        raise TrainingDivergedError(f"{what} at step {step + 1}", examples, weights_are_good)

    # Checkpoints.

    def begin_update(self) -> None:
        """Delay signals and discard the last state until the update is complete."""
        if self._checkpoints is not None:
            self._held.hold()
            self._last = None

    def release_signals(self) -> None:
        """Stop delaying signals; needed if a step raised an error."""
        self._held.release()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if self.control.should_log or self.control.should_evaluate:
            self._check_deferred()
        checkpoints, step = self._checkpoints, self.state.global_step
        is_new = self._last is None or self._last["step"] != step
        if checkpoints is not None and is_new:
            self._last = self._end_of_step(grad_norm, learning_rate)
            # All processes take part in saving but their clocks differ, so the main one decides.
            if step >= self.state.max_steps or from_main(lambda: checkpoints.is_due):
                self.save()
                self._monitor.step_begins()
            self._held.release()
        super()._maybe_log_save_evaluate(
            tr_loss,
            grad_norm,
            model,
            trial,
            epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=learning_rate,
        )
        if is_new and self.control.should_training_stop and step < self.state.max_steps:
            self.save()  # as after the last step: nothing is left to do but to evaluate

    def _end_of_step(
        self, grad_norm: torch.Tensor | float | None, learning_rate: float | None
    ) -> dict[str, Any]:
        """Return the part of the state that changes before the next update: a few kilobytes."""
        state = copy.copy(self.state)
        state.log_history = []
        return {
            "step": self.state.global_step,
            "trainer": state,
            "best": None if self._best is None else self._best.state(),
            "own": {  # differs between processes
                "random": random_state(),
                "monitor": self._monitor.state(),
                "losses": {
                    "since_logged": self._tr_loss.clone(),
                    "before": self._total_loss_scalar,
                    "logged_at": self._globalstep_last_logged,
                },
            },
            "pending": {
                "should_log": self.control.should_log,
                "should_evaluate": self.control.should_evaluate,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
            },
            "seconds": self.seconds,
        }

    def save(self) -> Path | None:
        """Write the state at the end of the last step.

        In distributed training, all processes must call this after the same step.

        Returns:
            The folder of the checkpoint; None if there is no state or checkpoints are off.
        """
        checkpoints, last = self._checkpoints, self._last
        if checkpoints is None or last is None:
            return None

        def own() -> dict[str, Any]:
            self._check_deferred()
            return last["own"]

        processes = each_a_share(lambda mine: [own()], process_count())
        return from_main(lambda: self._write(checkpoints, last, processes))

    def _write(
        self, checkpoints: SavedStates, last: dict[str, Any], processes: list[dict[str, Any]]
    ) -> Path:
        args = self.args
        content = {
            **{key: last[key] for key in ("pending", "seconds", "best")},
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "trainer": last["trainer"].__dict__,
            "processes": processes,
            "adapter": {n: p for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        with HeldSignals():
            return checkpoints.save(last["step"], content)

    def train_from(self, saved: Saved | None) -> Any:
        """Train from a checkpoint or from the beginning; see `Trainer.train`."""
        if saved is None:
            return self.train()
        self._begun -= saved.content["seconds"]
        # Trainer reads its position from a file with this name.
        scratch = Path(str(self.args.output_dir))
        state = copy.copy(self.state)
        state.__dict__.update(saved.content["trainer"])
        # Moved, so that the loaded tensors are freed as soon as they have been copied.
        self._resumed = dict(saved.content)
        saved.content.clear()
        state.save_to_json(str(scratch / TRAINER_STATE_NAME))
        return self.train(resume_from_checkpoint=str(scratch))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._resumed is not None
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, saved in self._resumed["adapter"].items():
                weights[name].copy_(saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            set_optimizer_state(self.optimizer, self._resumed["optimizer"])
            self.lr_scheduler.load_state_dict(self._resumed["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._resumed["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer calls this after it has created the epoch's iterator, which draws a random number.
        if self._resumed is not None:
            set_random_state(self._resumed["now"])

    def finish_resumed_step(self) -> None:
        """Restore state that Trainer does not restore, then run any logging and evaluation due.

        Called before Trainer begins the next step.
        """
        if self._resumed is None:
            return
        resumed, step = self._resumed, self.state.global_step
        own = resumed["processes"][process_number()]
        self._monitor.set_state(own["monitor"])
        if self._best is not None:
            self._best.set_state(resumed["best"])
        losses, pending = own["losses"], resumed["pending"]
        self._tr_loss.copy_(losses["since_logged"])
        self._total_loss_scalar = losses["before"]
        self._globalstep_last_logged = losses["logged_at"]
        self._initial_global_step = 0  # the mean loss covers all steps
        set_random_state(own["random"])
        self.control.should_log = pending["should_log"]
        self.control.should_evaluate = pending["should_evaluate"]
        self._last = {
            **{key: resumed[key] for key in ("pending", "seconds", "best")},
            "own": own,
            "step": step,
            "trainer": copy.copy(self.state),
        }
        self._maybe_log_save_evaluate(
            self._tr_loss,
            pending["grad_norm"],
            self.model,
            None,
            self.state.epoch,
            None,
            time.time(),
            learning_rate=pending["learning_rate"],
        )
        self._resumed = {"now": random_state()}


class _Hooks(TrainerCallback):
    """Call the trainer on events that Trainer has no method for; runs after all other callbacks."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.finish_resumed_step()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_update()
