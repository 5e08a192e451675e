"""Test that training interrupted at any point gives the same result as uninterrupted training."""

import itertools
import json

import pytest
import torch

from gptj8.runtime.errors import UserError
from gptj8.training.batches import RowOrder
from gptj8.training.saved_states import SavedStates, training_key
from tests.helpers.training_rows import assert_same, changed, interrupted_at, trained


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# 18 micro-batches of training with 18 micro-batches of validation between them.
@pytest.mark.parametrize(
    "call",
    [call if call in (2, 9) else slow(call) for call in range(1, 37)],
)
def test_resumed_training_equals_uninterrupted_training(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, call
):
    wanted = trained(tiny_8bit_dir, examples)
    states = checkpoints(None)  # written only at the interruption
    with interrupted_at(monkeypatch, call), pytest.raises(KeyboardInterrupt):
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
def test_repeated_interruptions_do_not_change_the_result(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, kind
):
    settings = changed(**kind)
    wanted = trained(tiny_8bit_dir, examples, settings)
    states = checkpoints(None)
    attempts = 0
    while attempts < 50:
        try:
            with interrupted_at(monkeypatch, 9):  # an evaluation has up to six micro-batches
                found = trained(tiny_8bit_dir, examples, settings, states)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert attempts >= 1
    assert_same(found, wanted)


@pytest.mark.parametrize("method", ["layernorm", slow("lora")])
def test_bfloat16_and_layernorm_training_resumes(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, method
):
    kind = {"method": method, "dtype": torch.bfloat16}
    wanted = trained(tiny_8bit_dir, examples, **kind)
    states = checkpoints(None)
    with interrupted_at(monkeypatch, 15), pytest.raises(KeyboardInterrupt):
        trained(tiny_8bit_dir, examples, checkpoints=states, **kind)
    assert states.latest() is not None
    assert_same(trained(tiny_8bit_dir, examples, checkpoints=states, **kind), wanted)


def test_interruption_while_measuring_accuracy_repeats_no_step(
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
    assert min(steps) == 8  # no step is repeated


def test_states_are_saved_periodically_and_two_are_kept(tiny_8bit_dir, examples, checkpoints):
    seen = []
    states = checkpoints(0.0)

    def log(values, step):
        seen.append(sorted(path.name for path in states.folder.glob("*")))

    trained(tiny_8bit_dir, examples, checkpoints=states, log=log)
    assert seen[0] == ["step-000000001", "step-000000002"]
    assert seen[-1] == ["step-000000008", "step-000000009"]
    states.clear()
    assert states.latest() is None and not states.folder.exists()


def test_resuming_finished_training_only_evaluates(tiny_8bit_dir, examples, checkpoints):
    states, steps = checkpoints(3600.0), []
    wanted = trained(tiny_8bit_dir, examples, checkpoints=states)
    assert [path.name for path in states.folder.glob("*")] == ["step-000000009"]
    found = trained(
        tiny_8bit_dir, examples, checkpoints=states, log=lambda v, step: steps.append(step)
    )
    assert_same(found, wanted)
    assert set(steps) == {9}


def test_saving_does_not_change_the_result(tiny_8bit_dir, examples, checkpoints):
    assert_same(
        trained(tiny_8bit_dir, examples, checkpoints=checkpoints(0.0)),
        trained(tiny_8bit_dir, examples),
    )


_FAST_CASES = [("tensors.safetensors", "flipped"), ("manifest.json", "missing")]


def flip(file, offset):
    content = bytearray(file.read_bytes())
    content[offset % len(content)] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        case if case in _FAST_CASES else slow(*case)
        for case in itertools.product(
            ["state.json", "tensors.safetensors", "manifest.json"], ["flipped", "cut", "missing"]
        )
    ],
)
def test_damaged_state_is_reported_and_the_previous_one_used(
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


def test_unusable_states_do_not_displace_usable_ones(tmp_path, capsys):
    states = SavedStates(tmp_path, "k" * 64, None)
    for step in (500, 520):
        (states.save(step, {"x": torch.zeros(2)}) / "state.json").unlink()
    assert states.latest() is None
    for step in (10, 20, 30):
        assert states.save(step, {"x": torch.zeros(2)}).is_dir()
        assert states.latest().step == step
    assert [folder.name[-2:] for folder in sorted(states.folder.iterdir())] == ["20", "30"]


def test_missing_input_of_the_key_raises(tmp_path):
    with pytest.raises(UserError, match="does not exist; rerun the stage that writes it"):
        training_key({}, tmp_path / "manifest.json")


def test_states_of_another_training_run_are_not_used(tiny_8bit_dir, examples, tmp_path, capsys):
    first = SavedStates(tmp_path, "a" * 64, 0.0)
    trained(tiny_8bit_dir, examples, checkpoints=first)
    other = SavedStates(tmp_path, "b" * 64, 0.0)
    assert other.latest() is None
    first.folder.rename(other.folder)
    assert other.latest() is None
    assert "belongs to another training run" in capsys.readouterr().err


def test_key_depends_on_settings_and_inputs(tmp_path):
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


def test_states_contain_no_pickles(tiny_8bit_dir, examples, checkpoints):
    states = checkpoints(0.0)
    trained(tiny_8bit_dir, examples, checkpoints=states)
    folder = states.latest().folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "state.json",
        "tensors.safetensors",
    ]
    assert json.loads((folder / "state.json").read_text())["step"] == 9


def test_same_training_cannot_run_twice_at_once(checkpoints):
    with checkpoints().alone():
        with pytest.raises(UserError, match="the same training is running in another process"):
            with checkpoints().alone():
                pass
    with checkpoints().alone():
        pass


def test_order_of_an_epoch_does_not_depend_on_earlier_epochs(examples):
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
