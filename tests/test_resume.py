"""A training that was interrupted, wherever that was, ends as one that was not."""

import contextlib
import itertools
import json
import math
import re
import signal

import pandas as pd
import pytest
import torch

from gptj8.dataset import load_prepared
from gptj8.errors import UserError
from gptj8.training import Checkpoints, LossLost, train, training_key
from gptj8.training.batches import RowOrder
from gptj8.training.trainer import CompletionTrainer
from tests.prepared_dataset import write_prepared
from tests.training_rows import SETTINGS, adapted_model, changed, lasting, rows, weights_of


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def examples(tiny_8bit_dir):
    return rows(tiny_8bit_dir)


@pytest.fixture
def checkpoints(tmp_path):
    return lambda every=0.0: Checkpoints(tmp_path / "checkpoints", "k" * 64, every)


def accuracy(model, batch_size):
    """Something of the weights, which draws random numbers as a measure might."""
    return float(sum(w.abs().sum() for w in weights_of(model).values()) + torch.rand(()) * 0)


def trained(folder, examples, settings=SETTINGS, checkpoints=None, log=None, **model):
    adapted = adapted_model(folder, **model)
    log = log or (lambda values, step: None)
    result = train(adapted, examples, examples, settings, 0, log, accuracy, checkpoints)
    return weights_of(adapted), lasting(result)


def assert_same(found, wanted):
    for name, weight in wanted[0].items():
        assert torch.equal(found[0][name], weight), name
    assert found[1] == wanted[1]


@contextlib.contextmanager
def ended_at(monkeypatch, call, error=KeyboardInterrupt):
    """Let the n-th micro-batch raise, once."""
    original, calls = CompletionTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionTrainer, "compute_loss", compute_loss)
        yield


# Eighteen micro-batches of training and as many of validation between them.
@pytest.mark.parametrize(
    "call",
    [call if call in (2, 9) else slow(call) for call in range(1, 37)],
)
def test_an_interrupted_training_ends_as_an_undisturbed_one(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, call
):
    wanted = trained(tiny_8bit_dir, examples)
    states = checkpoints(None)  # written at the interruption alone
    with ended_at(monkeypatch, call), pytest.raises(KeyboardInterrupt):
        trained(tiny_8bit_dir, examples, checkpoints=states)
    assert (states.latest() is None) == (call <= 2)
    assert_same(trained(tiny_8bit_dir, examples, checkpoints=states), wanted)


@pytest.mark.parametrize(
    "kind",
    [
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "num_train_epochs": 1.5},
        slow({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1}),
        slow({"max_eval_samples": 3, "logging_steps": 1, "eval_steps": 2}),
        slow({"checkpointing": "none"}),
    ],
    ids=str,
)
def test_whatever_the_settings_it_may_end_again_and_again(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, kind
):
    settings = changed(**kind)
    wanted = trained(tiny_8bit_dir, examples, settings)
    states = checkpoints(None)
    attempts = 0
    while attempts < 50:
        try:
            with ended_at(monkeypatch, 9):  # an evaluation takes up to six
                found = trained(tiny_8bit_dir, examples, settings, states)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert attempts >= 1
    assert_same(found, wanted)


@pytest.mark.parametrize("method", ["layernorm", slow("lora")])
def test_bfloat16_and_layernorms_go_on_too(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, method
):
    kind = {"method": method, "dtype": torch.bfloat16}
    wanted = trained(tiny_8bit_dir, examples, **kind)
    states = checkpoints(None)
    with ended_at(monkeypatch, 15), pytest.raises(KeyboardInterrupt):
        trained(tiny_8bit_dir, examples, checkpoints=states, **kind)
    assert states.latest() is not None
    assert_same(trained(tiny_8bit_dir, examples, checkpoints=states, **kind), wanted)


def test_an_interruption_while_accuracy_is_measured_loses_nothing(
    tiny_8bit_dir, examples, checkpoints, monkeypatch
):
    wanted = trained(tiny_8bit_dir, examples)
    states, steps = checkpoints(None), []

    def interrupted(values, step):
        if "eval_accuracy" in values and step == 8:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        trained(tiny_8bit_dir, examples, checkpoints=states, log=interrupted)
    assert states.latest().step == 8
    assert_same(
        trained(
            tiny_8bit_dir, examples, checkpoints=states, log=lambda v, step: steps.append(step)
        ),
        wanted,
    )
    assert min(steps) == 8  # no step is made again


def test_states_are_written_as_time_passes_and_two_are_kept(tiny_8bit_dir, examples, checkpoints):
    seen = []
    states = checkpoints(0.0)

    def log(values, step):
        seen.append(sorted(path.name for path in states.folder.glob("*")))

    trained(tiny_8bit_dir, examples, checkpoints=states, log=log)
    assert seen[0] == ["step-000000001", "step-000000002"]
    assert seen[-1] == ["step-000000008", "step-000000009"]
    states.clear()
    assert states.latest() is None and not states.folder.exists()


def test_a_finished_training_is_only_measured_again(tiny_8bit_dir, examples, checkpoints):
    states, steps = checkpoints(3600.0), []
    wanted = trained(tiny_8bit_dir, examples, checkpoints=states)
    assert [path.name for path in states.folder.glob("*")] == ["step-000000009"]
    found = trained(
        tiny_8bit_dir, examples, checkpoints=states, log=lambda v, step: steps.append(step)
    )
    assert_same(found, wanted)
    assert set(steps) == {9}


def test_saving_changes_nothing(tiny_8bit_dir, examples, checkpoints):
    assert_same(
        trained(tiny_8bit_dir, examples, checkpoints=checkpoints(0.0)),
        trained(tiny_8bit_dir, examples),
    )


_DAMAGED_FIRST = [("tensors.safetensors", "flipped"), ("manifest.json", "gone")]


def flip(file, offset):
    content = bytearray(file.read_bytes())
    content[offset % len(content)] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        case if case in _DAMAGED_FIRST else slow(*case)
        for case in itertools.product(
            ["state.json", "tensors.safetensors", "manifest.json"], ["flipped", "cut", "gone"]
        )
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    tiny_8bit_dir, examples, checkpoints, capsys, name, how
):
    wanted = trained(tiny_8bit_dir, examples)
    states = checkpoints(0.0)
    trained(tiny_8bit_dir, examples, checkpoints=states)
    file = states.folder / "step-000000009" / name
    if how == "flipped":
        flip(file, file.stat().st_size // 2)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.unlink()
    assert states.latest().step == 8
    assert f"the checkpoint {file.parent} is not used: " in capsys.readouterr().err
    assert_same(trained(tiny_8bit_dir, examples, checkpoints=states), wanted)


def test_states_that_are_not_usable_do_not_push_out_good_ones(tmp_path, capsys):
    states = Checkpoints(tmp_path, "k" * 64, None)
    for step in (500, 520):
        (states.save(step, {"x": torch.zeros(2)}) / "state.json").unlink()
    assert states.latest() is None
    for step in (10, 20, 30):
        assert states.save(step, {"x": torch.zeros(2)}).is_dir()
        assert states.latest().step == step
    assert [folder.name[-2:] for folder in sorted(states.folder.iterdir())] == ["20", "30"]


def test_a_key_needs_its_inputs(tmp_path):
    with pytest.raises(UserError, match="does not exist; rerun the stage that writes it"):
        training_key({}, tmp_path / "manifest.json")


def test_what_another_training_saved_is_not_used(tiny_8bit_dir, examples, tmp_path, capsys):
    first = Checkpoints(tmp_path, "a" * 64, 0.0)
    trained(tiny_8bit_dir, examples, checkpoints=first)
    other = Checkpoints(tmp_path, "b" * 64, 0.0)
    assert other.latest() is None
    first.folder.rename(other.folder)
    assert other.latest() is None
    assert "was saved by another training" in capsys.readouterr().err


def test_the_key_changes_with_all_that_decides(tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("1")
    inputs = (tmp_path / "file", tmp_path / "folder")
    key = training_key({"r": 8}, *inputs)
    assert key == training_key({"r": 8}, *inputs)
    keys = {key, training_key({"r": 4}, *inputs)}
    for file in ("file", "folder/x"):
        (tmp_path / file).write_text("2")
        keys.add(training_key({"r": 8}, *inputs))
    assert len(keys) == 4


def test_no_state_is_a_pickle(tiny_8bit_dir, examples, checkpoints):
    states = checkpoints(0.0)
    trained(tiny_8bit_dir, examples, checkpoints=states)
    folder = states.latest().folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "state.json",
        "tensors.safetensors",
    ]
    assert json.loads((folder / "state.json").read_text())["step"] == 9


def test_one_training_at_a_time(checkpoints):
    with checkpoints().alone():
        with pytest.raises(UserError, match="the same training is under way in another process"):
            with checkpoints().alone():
                pass
    with checkpoints().alone():
        pass


def test_a_later_epoch_finds_its_order_alone(examples):
    order = RowOrder(examples, 4, seed=1)
    orders = [order.of(epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert all(sorted(rows) == list(range(12)) for rows in orders)
    order.epoch = 2
    assert list(order) == orders[2]
    assert [order.rows_of_step(step) for step in (3, 4, 5)] == [
        orders[1][:4],
        orders[1][4:8],
        orders[1][8:],
    ]


# What goes wrong.


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
        with pytest.raises(LossLost, match=message) as caught:
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
    with pytest.raises(LossLost, match=r"the loss has grown to \S+ at step 2; look at those"):
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
    with pytest.raises(LossLost, match=reason) as caught:
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
    from stages.finetune import _of_rows

    columns = ["text", "label", "file", "row"]
    rows = pd.DataFrame([["t", "l", f"{n % 2}.csv", 10 + n] for n in range(6)], columns=columns)
    splits = {"train": rows, "validation": rows[:1], "test": rows[:1]}
    write_prepared(tmp_path, "classification", splits)
    lost = LossLost("the loss is nan at step 3", [4, 1])
    assert _of_rows(lost, load_prepared(tmp_path)) == (
        "the loss is nan at step 3 on 0.csv:14, 1.csv:11; look at those rows, or lower "
        "finetune.learning_rate or max_grad_norm"
    )
