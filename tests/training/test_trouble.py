"""Test failures in training: losses of NaN or infinity, and running out of memory."""

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
    """Make the loss NaN or the gradients infinite in the micro-batch with number `at`."""
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
def test_nonfinite_loss_names_the_rows_and_keeps_the_previous_weights(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, what, message
):
    states = checkpoints(None)
    with monkeypatch.context() as patch:
        poison(patch, 12, what)  # the second micro-batch of the sixth step
        with pytest.raises(TrainingDivergedError, match=message) as caught:
            trained(tiny_8bit_dir, examples, checkpoints=states)
    expected = RowOrder(examples, 4, SETTINGS.seed).rows_of_step(5)
    assert caught.value.examples == expected
    assert f"on examples {', '.join(map(str, expected))}; check the rows" in str(caught.value)
    assert states.latest().step == 5
    assert_same(
        trained(tiny_8bit_dir, examples, checkpoints=states), trained(tiny_8bit_dir, examples)
    )


def test_exploding_loss_stops_training(tiny_8bit_dir, examples, monkeypatch):
    original = CompletionTrainer.compute_loss
    monkeypatch.setattr(
        CompletionTrainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * 5
    )
    with pytest.raises(
        TrainingDivergedError, match=r"the loss grew to \S+ at step 2; check the rows"
    ):
        trained(tiny_8bit_dir, examples)


def test_out_of_memory_reduces_the_micro_batch_size(
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
    output = capsys.readouterr().out
    message = "out of memory; continuing with a micro-batch size of 2, gradient accumulation 2"
    assert message in output
    assert re.search(r"resuming after step 4, saved \S+ s ago", output)
    for name, weight in wanted[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-3, atol=1e-4)


def test_reduced_micro_batch_size_is_kept(tiny_8bit_dir, examples, checkpoints, monkeypatch):
    def failing(fails_at):
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
        patch.setattr(CompletionTrainer, "compute_loss", failing(3))
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_8bit_dir, examples, settings, states)
    _, result = trained(tiny_8bit_dir, examples, settings, states)
    assert result["per_device_train_batch_size"] == 2
    assert result["gradient_accumulation_steps"] == 2


def test_failed_step_is_not_saved(tiny_8bit_dir, examples, checkpoints, monkeypatch):
    import bitsandbytes.optim as optim

    original, calls = optim.AdamW.update_step, []

    def update_step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 40:  # in the middle of an update
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


def test_deferred_check_names_the_step(tiny_8bit_dir, examples, monkeypatch):
    """On a GPU the loss is checked later; the error still names the step of the NaN."""

    def check_finite(self, value, what):
        step = self.state.global_step
        self._unchecked.append((step, value.detach() * (math.nan if step == 2 else 1)))

    monkeypatch.setattr(CompletionTrainer, "_check_finite", check_finite)
    reason = "the loss or the norm of its gradients is nan at step 3"
    with pytest.raises(TrainingDivergedError, match=reason) as caught:
        trained(tiny_8bit_dir, examples)
    assert caught.value.examples == RowOrder(examples, 4, SETTINGS.seed).rows_of_step(2)
    assert not caught.value.weights_are_good


def test_out_of_memory_at_micro_batch_size_1_raises(tiny_8bit_dir, examples, monkeypatch):
    def compute_loss(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="out of memory at micro-batch size 1; lower data"):
        trained(tiny_8bit_dir, examples)


def test_naming_rows_names_files_and_rows(tmp_path):
    columns = ["text", "label", "file", "row"]
    rows = pd.DataFrame([["t", "l", f"{n % 2}.csv", 10 + n] for n in range(6)], columns=columns)
    splits = {"train": rows, "validation": rows[:1], "test": rows[:1]}
    write_prepared(tmp_path, "classification", splits)
    diverged = TrainingDivergedError("the loss is nan at step 3", [4, 1])
    with pytest.raises(UserError) as caught, naming_rows(load_prepared(tmp_path)):
        raise diverged
    assert str(caught.value) == (
        "the loss is nan at step 3 on 0.csv:14, 1.csv:11; check the rows, or lower "
        "finetune.learning_rate or max_grad_norm"
    )
