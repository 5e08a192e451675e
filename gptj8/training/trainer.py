"""transformers' Trainer, with the loss of completions alone and states to go on from."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from gptj8.dataset.prepared.examples import IGNORED
from gptj8.runtime.distributed import each_a_share, from_main, process_count, process_number
from gptj8.training.batches import RowOrder
from gptj8.training.loss import frozen_cross_entropy, frozen_head, input_of
from gptj8.training.monitor import Monitor
from gptj8.training.saved_states import Saved, SavedStates
from gptj8.training.signals import HeldSignals
from gptj8.training.state import (
    optimizer_state,
    random_state,
    set_optimizer_state,
    set_random_state,
)
from gptj8.training.trouble import TrainingDivergedError


def summed_loss(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the loss summed over learned tokens, how many those are, and the model's outputs."""
    targets = inputs["labels"][:, 1:]  # the logits at a position predict the next one's token
    learned = (targets != IGNORED).any(dim=0).nonzero().flatten()
    targets = targets[:, learned]
    arguments = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "logits_to_keep": learned,
    }
    head = frozen_head(model)
    if head is None:
        outputs = model(**arguments)
        total = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    else:
        with input_of(head) as taken:
            outputs = model(**arguments)
        is_learned = targets != IGNORED
        total = frozen_cross_entropy(taken[0][is_learned], targets[is_learned], head)
    return total, (targets != IGNORED).sum(), outputs


class CompletionTrainer(Trainer):
    """A Trainer that asks for logits only where a token is learned, and can go on where another one
    stopped.

    The head is a fifth of the arithmetic of a small model, and float32 logits of a prompt are the
    largest tensors of a large one; neither the prompt's nor the padding's are of use.

    A state is that of the end of a step, before what the step's number asks for (logging,
    evaluation): a training that goes on begins with these. Weights and optimizer do not change
    until the next step's end, while which SIGINT and SIGTERM wait; so `save` has at every moment
    something whole to write, though an evaluation may take an hour.

    Args:
        monitor: what is measured; part of the state.
        checkpoints: where states are written to; None: nowhere.
        arguments: of `Trainer`.
    """

    # Trainer sets them before a first step; its own types allow for none.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *, monitor: Monitor, checkpoints: SavedStates | None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._monitor, self._checkpoints = monitor, checkpoints
        self._rows: RowOrder | None = None
        self._last: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._held = HeldSignals()
        self._begun = time.perf_counter()
        self._unseen: list[tuple[int, torch.Tensor]] = []
        self.add_callback(_Moments(self))

    @property
    def seconds(self) -> float:
        """Since training began, without what lay between two attempts."""
        return time.perf_counter() - self._begun

    # What a step learns from, and its loss.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        total, learned, outputs = summed_loss(model, inputs)
        # With accumulated gradients, Trainer counts the learned tokens of all micro-batches.
        count = learned if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None:  # of all processes, over which gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self._monitor.count(inputs["attention_mask"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._look_at(loss, "loss")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # scaled ones may be infinite
            self._look_at(torch.as_tensor(norm), "norm of the gradients")
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        processes = self.accelerator.num_processes
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
        self._rows = RowOrder(rows, step, self.args.seed)
        return self._rows

    def begin_epoch(self, epoch: int) -> None:
        """Take the rows in the order of an epoch, counted from 0."""
        if self._rows is not None:
            self._rows.epoch = epoch

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *args, **kwargs)

    # A loss that is no number.

    def _look_at(self, value: torch.Tensor, what: str) -> None:
        """Stop before weights are changed by what is no number.

        On a GPU, where looking would wait for the step, it is looked at when the loss is logged.
        """
        value, step = value.detach(), self.state.global_step
        if value.device.type != "cpu":
            self._unseen.append((step, value))
        elif not bool(torch.isfinite(value)):
            self._lose(f"the {what} is {float(value)}", step, weights_are_good=True)

    def _look_back(self) -> None:
        """Look at what was put off."""
        if not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        finite = torch.isfinite(torch.stack([value.float() for _, value in unseen])).tolist()
        if not all(finite):
            step, value = unseen[finite.index(False)]
            what = f"the loss or the norm of its gradients is {float(value)}"
            self._lose(what, step, weights_are_good=False)

    def _lose(self, what: str, step: int, weights_are_good: bool) -> None:
        examples = [] if self._rows is None else self._rows.rows_of_step(step)
        raise TrainingDivergedError(f"{what} at step {step + 1}", examples, weights_are_good)

    # States.

    def begin_update(self) -> None:
        """From here on until the state of the step's end is known, nothing interrupts, and there is
        nothing that could be saved."""
        if self._checkpoints is not None:
            self._held.hold()
            self._last = None

    def release_signals(self) -> None:
        """End the waiting of signals, if a step ended in an error."""
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
            self._look_back()
        checkpoints, step = self._checkpoints, self.state.global_step
        if checkpoints is not None and (self._last is None or self._last["step"] != step):
            self._last = self._end_of_step(grad_norm, learning_rate)
            # Time is not the same in all processes, and all of them take part.
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

    def _end_of_step(
        self, grad_norm: torch.Tensor | float | None, learning_rate: float | None
    ) -> dict[str, Any]:
        """Return what changes before the next step's end: a few kilobytes."""
        state = copy.copy(self.state)
        state.log_history = []
        return {
            "step": self.state.global_step,
            "trainer": state,
            "own": {  # each process has another one
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
        """Write the state of the last step's end.

        In several processes all have to call it after the same step.

        Returns:
            where it is; None if there is nothing to save, or nowhere.
        """
        checkpoints, last = self._checkpoints, self._last
        if checkpoints is None or last is None:
            return None

        def own() -> dict[str, Any]:
            self._look_back()
            return last["own"]

        processes = each_a_share(lambda mine: [own()], process_count())
        return from_main(lambda: self._write(checkpoints, last, processes))

    def _write(
        self, checkpoints: SavedStates, last: dict[str, Any], processes: list[dict[str, Any]]
    ) -> Path:
        args = self.args
        content = {
            **{key: last[key] for key in ("pending", "seconds")},
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
        """Train from a state, or from the beginning; see `Trainer.train`."""
        if saved is None:
            return self.train()
        self._begun -= saved.content["seconds"]
        # Trainer reads where it stands from a file of this name.
        scratch = Path(str(self.args.output_dir))
        state = copy.copy(self.state)
        state.__dict__.update(saved.content["trainer"])
        # Moved: what was loaded is let go of when it has been taken over.
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
        # Trainer calls it when the epoch's rows are at hand, whose iterator has drawn a number.
        if self._resumed is not None:
            set_random_state(self._resumed["now"])

    def finish_resumed_step(self) -> None:
        """Finish the step that was saved: what Trainer forgets, and what the step still asked for.

        Called when Trainer is about to begin the next step.
        """
        if self._resumed is None:
            return
        resumed, step = self._resumed, self.state.global_step
        own = resumed["processes"][process_number()]
        self._monitor.set_state(own["monitor"])
        losses, pending = own["losses"], resumed["pending"]
        self._tr_loss.copy_(losses["since_logged"])
        self._total_loss_scalar = losses["before"]
        self._globalstep_last_logged = losses["logged_at"]
        self._initial_global_step = 0  # the mean loss is of all steps
        set_random_state(own["random"])
        self.control.should_log = pending["should_log"]
        self.control.should_evaluate = pending["should_evaluate"]
        self._last = {
            **{key: resumed[key] for key in ("pending", "seconds")},
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


class _Moments(TrainerCallback):
    """Tells the trainer of moments that Trainer has no method for; after all other callbacks."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.finish_resumed_step()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_update()
