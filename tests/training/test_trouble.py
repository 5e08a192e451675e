"""What goes wrong in a training: losses that are no numbers, and memory that ends."""

import math
import re
import signal

import pandas as pd
import pytest
import torch

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.runtime.errors import UserError
from gptj8.training.batches import RowOrder
from gptj8.training.trainer import CompletionTrainer
from gptj8.training.trouble import TrainingDivergedError, naming_rows
from tests.helpers.prepared_dataset import write_prepared
from tests.helpers.training_rows import SETTINGS, assert_same, changed, trained


def poison(monkeypatch, at, what):
    """Let the loss or the gradients of one step be no number."""
    original, calls = CompletionTrainer.training_step, []

    def training_step(self, model, inputs, *args, **kwargs):
        calls.append(None)
        if len(calls) == at and what == "gradient":
            weight = next(p for p in self.model.parameters() if p.requires_grad)
            handle = weight.register_hook(lambda gradient: gradient * math.inf)
        loss = original(self, model, inputs, *args, **kwargs)
        if len(calls) == at and what == "gradient":
            handle.remove()
        return loss

    def compute_loss(self, *args, original=CompletionTrainer.compute_loss, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.nan if len(calls) == at and what == "loss" else loss

    monkeypatch.setattr(CompletionTrainer, "training_step", training_step)
    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", "the loss is nan at step 6"),
        ("gradient", "the norm of the gradients is inf at step 6"),
    ],
)
def test_a_lost_loss_names_its_rows_and_keeps_the_weights_before(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, what, message
):
    states = checkpoints(None)
    with monkeypatch.context() as patch:
        poison(patch, 12, what)  # the second micro-batch of the sixth step
        with pytest.raises(TrainingDivergedError, match=message) as caught:
            trained(tiny_8bit_dir, examples, checkpoints=states)
    expected = RowOrder(examples, 4, SETTINGS.seed).rows_of_step(5)
    assert caught.value.examples == expected
    assert f"on examples {', '.join(map(str, expected))}; look at those rows" in str(caught.value)
    assert states.latest().step == 5
    assert_same(
        trained(tiny_8bit_dir, examples, checkpoints=states), trained(tiny_8bit_dir, examples)
    )


def test_a_loss_that_explodes_stops_the_training(tiny_8bit_dir, examples, monkeypatch):
    original = CompletionTrainer.compute_loss
    monkeypatch.setattr(
        CompletionTrainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * 5
    )
    with pytest.raises(
        TrainingDivergedError, match=r"the loss has grown to \S+ at step 2; look at those"
    ):
        trained(tiny_8bit_dir, examples)


def test_out_of_memory_takes_fewer_rows_at_a_time(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, capsys
):
    settings = changed(
        per_device_train_batch_size=4, gradient_accumulation_steps=1, optim="adamw_torch"
    )
    wanted = trained(tiny_8bit_dir, examples, settings, dropout=0.0)
    original, calls = CompletionTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) > 5 and model.training and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    states = checkpoints(None)
    found = trained(tiny_8bit_dir, examples, settings, checkpoints=states, dropout=0.0)
    assert {4, 2, 1} <= set(calls)
    said = capsys.readouterr().out
    assert "out of memory; goes on with 2 sequences at a time, 2 times an optimizer step" in said
    assert re.search(r"goes on after step 4, saved \S+ s ago", said)
    for name, weight in wanted[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-3, atol=1e-4)


def test_sizes_that_memory_asked_for_are_kept(tiny_8bit_dir, examples, checkpoints, monkeypatch):
    def ending(fails_at):
        original, calls = CompletionTrainer.compute_loss, []

        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(len(inputs["input_ids"]))
            if len(calls) == fails_at and model.training:
                raise torch.OutOfMemoryError("out of memory")
            if len(calls) == 2 * fails_at:
                raise KeyboardInterrupt
            return original(self, model, inputs, *args, **kwargs)

        return compute_loss

    settings = changed(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    states = checkpoints(None)
    with monkeypatch.context() as patch:
        patch.setattr(CompletionTrainer, "compute_loss", ending(3))
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_8bit_dir, examples, settings, states)
    _, result = trained(tiny_8bit_dir, examples, settings, states)
    assert result["per_device_train_batch_size"] == 2
    assert result["gradient_accumulation_steps"] == 2


def test_a_step_that_ends_in_an_error_is_not_saved_half(
    tiny_8bit_dir, examples, checkpoints, monkeypatch
):
    import bitsandbytes.optim as optim

    original, calls = optim.AdamW.update_step, []

    def update_step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 40:  # in the midst of a step's weights
            raise torch.OutOfMemoryError("out of memory")
        return original(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(optim.AdamW, "update_step", update_step)
        found = trained(tiny_8bit_dir, examples, SETTINGS, checkpoints(None), dropout=0.0)
    assert len(calls) > 40
    assert signal.getsignal(signal.SIGTERM) is before
    wanted = trained(
        tiny_8bit_dir,
        examples,
        changed(per_device_train_batch_size=1, gradient_accumulation_steps=4),
        dropout=0.0,
    )
    assert_same(found, wanted)


def test_a_gpus_loss_is_looked_at_later(tiny_8bit_dir, examples, monkeypatch):
    """As on a device where looking waits: what was lost is named with its step, two steps later."""

    def look_at(self, value, what):
        step = self.state.global_step
        self._unseen.append((step, value.detach() * (math.nan if step == 2 else 1)))

    monkeypatch.setattr(CompletionTrainer, "_look_at", look_at)
    reason = "the loss or the norm of its gradients is nan at step 3"
    with pytest.raises(TrainingDivergedError, match=reason) as caught:
        trained(tiny_8bit_dir, examples)
    assert caught.value.examples == RowOrder(examples, 4, SETTINGS.seed).rows_of_step(2)
    assert not caught.value.weights_are_good


def test_memory_that_ends_with_one_row_is_said(tiny_8bit_dir, examples, monkeypatch):
    def compute_loss(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="out of memory with one sequence at a time; lower data"):
        trained(tiny_8bit_dir, examples)


def test_the_stage_names_rows_as_the_user_knows_them(tmp_path):
    columns = ["text", "label", "file", "row"]
    rows = pd.DataFrame([["t", "l", f"{n % 2}.csv", 10 + n] for n in range(6)], columns=columns)
    splits = {"train": rows, "validation": rows[:1], "test": rows[:1]}
    write_prepared(tmp_path, "classification", splits)
    diverged = TrainingDivergedError("the loss is nan at step 3", [4, 1])
    with pytest.raises(UserError) as told, naming_rows(load_prepared(tmp_path)):
        raise diverged
    assert str(told.value) == (
        "the loss is nan at step 3 on 0.csv:14, 1.csv:11; look at those rows, or lower "
        "finetune.learning_rate or max_grad_norm"
    )
