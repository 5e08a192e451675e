"""Test that the best state is exported, also after interruptions, and that training stops early."""

import math
import types

import pytest
import torch

from gptj8.dataset.prepared.examples import lengths_of
from gptj8.runtime.errors import UserError
from gptj8.training.best_state import BestState, choose_metric
from gptj8.training.loop import train
from gptj8.training.trainer import CompletionTrainer
from tests.helpers.training_rows import (
    adapted_model,
    assert_resumes,
    assert_same,
    changed,
    interrupted_at,
    lasting,
    trained,
    weights_of,
)

BEST = changed(load_best_model_at_end=True)
"""Three steps per epoch; evaluations after steps 4 and 8, and at the ends of the three epochs."""

PEAK = {3: 0.2, 4: 0.5, 6: 0.9, 8: 0.4, 9: 0.3}


def same(found, wanted):
    return all(torch.equal(found[name], weight) for name, weight in wanted.items())


def states_of(folder, examples, settings=BEST, **model):
    """Return the weights at each evaluated step."""
    seen = []

    def measure(model, batch_size):
        seen.append(weights_of(model))
        return float(len(seen))  # better each time, so training does not stop

    _, result = trained(folder, examples, settings, measure=measure, **model)
    steps = [point["step"] for point in result["history"] if "eval_loss" in point]
    return dict(zip(steps, seen, strict=True))


def accuracy_from(states, values):
    """Return an accuracy that depends only on the weights, as it does in a resumed run."""

    def measure(model, batch_size):
        weights = weights_of(model)
        return next(values[step] for step, state in states.items() if same(weights, state))

    return measure


def evaluated(result):
    return {point["step"]: point for point in result["history"] if "eval_loss" in point}


@pytest.mark.parametrize("method", ["lora", "layernorm"])
def test_the_best_state_is_exported(tiny_8bit_dir, examples, method):
    states = states_of(tiny_8bit_dir, examples, method=method)
    measure = accuracy_from(states, PEAK)
    weights, result = trained(tiny_8bit_dir, examples, BEST, measure=measure, method=method)
    assert list(evaluated(result)) == [3, 4, 6, 8, 9]  # each step once
    assert same(weights, states[6]) and not same(weights, states[9])
    assert result["best_step"] == 6 and result["steps"] == 9
    assert result["eval_accuracy"] == 0.9
    assert result["eval_loss"] == evaluated(result)[6]["eval_loss"]


# Micro-batches: 3 steps of 2, 6 of validation, a step, 6, 2 steps, 6, 2 steps, 6, a step, 6.
@pytest.mark.parametrize(
    "call",
    [
        call if call in (9, 26, 45) else pytest.param(call, marks=pytest.mark.slow)
        for call in range(3, 49)
    ],
)
def test_a_resumed_run_exports_the_same_state(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, call
):
    measure = accuracy_from(states_of(tiny_8bit_dir, examples), PEAK)
    found = assert_resumes(
        tiny_8bit_dir, examples, checkpoints, monkeypatch, call, BEST, measure=measure
    )
    assert found[1]["best_step"] == 6


def test_repeated_interruptions_do_not_change_the_best_state(
    tiny_8bit_dir, examples, checkpoints, monkeypatch
):
    measure = accuracy_from(states_of(tiny_8bit_dir, examples), PEAK)
    wanted = trained(tiny_8bit_dir, examples, BEST, measure=measure)
    states, attempts = checkpoints(None), 0
    while attempts < 50:
        try:
            with interrupted_at(monkeypatch, 9):
                found = trained(tiny_8bit_dir, examples, BEST, states, measure=measure)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert attempts >= 3
    assert_same(found, wanted)


def test_running_out_of_memory_keeps_the_best_state(
    tiny_8bit_dir, examples, checkpoints, monkeypatch
):
    """The best step is before the one at which memory runs out."""
    states = states_of(tiny_8bit_dir, examples)
    known = accuracy_from(states, {step: 0.9 - step / 100 for step in states})

    def measure(model, batch_size):
        try:
            return known(model, batch_size)
        except StopIteration:  # steps with a smaller micro-batch round differently
            return 0.1

    # At a micro-batch of step 5: 2 x 4 in training, and 6 in each of two evaluations.
    with interrupted_at(monkeypatch, 21, torch.OutOfMemoryError("out of memory")):
        weights, result = trained(tiny_8bit_dir, examples, BEST, checkpoints(None), measure=measure)
    assert result["best_step"] == 3 and same(weights, states[3])


def test_without_checkpoints_running_out_of_memory_forgets_the_best_state(
    tiny_8bit_dir, examples, monkeypatch
):
    """Training begins again, with smaller micro-batches, so the first attempt has no part in it."""
    calls = []

    def measure(model, batch_size):
        calls.append(batch_size)
        return 1.0 if len(calls) == 1 else 0.5  # only the first attempt has been as good

    with interrupted_at(monkeypatch, 21, torch.OutOfMemoryError("out of memory")):
        _, result = trained(tiny_8bit_dir, examples, BEST, measure=measure, dropout=0.0)
    assert len(calls) == 7  # two in the first attempt, five in the second
    assert result["eval_accuracy"] == 0.5
    assert result["eval_loss"] == min(p["eval_loss"] for p in evaluated(result).values())


def test_loss_decides_without_labels(tiny_8bit_dir, examples):
    # What is learned is wrong for these, so their loss rises.
    others = [{**e, "input_ids": [(i + 50) % 400 for i in e["input_ids"]]} for e in examples]
    model = adapted_model(tiny_8bit_dir)
    settings = changed(load_best_model_at_end=True, learning_rate=0.3, num_train_epochs=6)
    result = lasting(train(model, examples, others, settings, 0))
    losses = {step: point["eval_loss"] for step, point in evaluated(result).items()}
    best = min(losses, key=losses.__getitem__)
    assert best != max(losses)
    assert result["best_step"] == best and result["eval_loss"] == losses[best]
    assert result["eval_accuracy"] is None


def test_metric_decides_what_is_best(tiny_8bit_dir, examples):
    measure = accuracy_from(states_of(tiny_8bit_dir, examples), PEAK)
    settings = changed(load_best_model_at_end=True, metric_for_best_model="eval_loss")
    _, result = trained(tiny_8bit_dir, examples, settings, measure=measure)
    losses = {step: point["eval_loss"] for step, point in evaluated(result).items()}
    assert result["best_step"] == min(losses, key=losses.__getitem__) != 6
    assert choose_metric("auto", True) == "eval_accuracy"
    assert choose_metric("auto", False) == choose_metric("eval_loss", True) == "eval_loss"
    with pytest.raises(ValueError, match="no accuracy is measured"):
        choose_metric("eval_accuracy", False)


def test_without_load_best_the_last_state_is_exported(tiny_8bit_dir, examples):
    # Without dropout, because each evaluation draws a random number.
    states = states_of(tiny_8bit_dir, examples, dropout=0.0)
    peak = {**PEAK, 4: 1.0}
    measure = accuracy_from(states, peak)
    weights, result = trained(tiny_8bit_dir, examples, measure=measure, dropout=0.0)
    assert list(evaluated(result)) == [4, 8, 9]
    assert same(weights, states[9])
    assert result["best_step"] is None and result["eval_accuracy"] == peak[9]


def test_the_result_says_which_step_is_exported(tiny_8bit_dir, examples):
    def result_of(best_at, settings=BEST):
        accuracies = iter([float(step == best_at) for step in (3, 4, 6, 8, 9)])
        measure = lambda model, size: next(accuracies)  # noqa: E731
        model = adapted_model(tiny_8bit_dir)
        return train(model, examples, examples, settings, 0, eval_accuracy=measure)

    middle, last = result_of(6), result_of(9)
    assert str(middle).endswith(", the best state is exported: that of step 6")
    assert middle.metrics["best_step"] == 6 and middle.metrics["steps"] == 9
    assert middle.metrics["tokens"] > middle.metrics["learned_tokens"] > 0
    assert "best" not in str(last) and last.metrics["best_step"] == 9
    without = result_of(6, changed())
    assert "best" not in str(without) and "best_step" not in without.metrics


STOP = changed(load_best_model_at_end=True, early_stopping_patience=2)
EARLY = {3: 0.5, 4: 0.4, 6: 0.4, 8: 0.9, 9: 1.0}
"""The second evaluation in a row without a better accuracy is that of step 6."""


def test_training_stops_early(tiny_8bit_dir, examples):
    states = states_of(tiny_8bit_dir, examples)
    weights, result = trained(tiny_8bit_dir, examples, STOP, measure=accuracy_from(states, EARLY))
    assert list(evaluated(result)) == [3, 4, 6]
    assert result["steps"] == 6 and result["best_step"] == 3
    assert same(weights, states[3])
    later = {**EARLY, 6: 0.6}  # a better one in between
    _, result = trained(tiny_8bit_dir, examples, STOP, measure=accuracy_from(states, later))
    assert result["steps"] == 9 and result["best_step"] == 9


@pytest.mark.parametrize(
    "call", [9, 18, *(pytest.param(c, marks=pytest.mark.slow) for c in range(19, 31))]
)
def test_a_resumed_run_stops_at_the_same_step(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, call
):
    measure = accuracy_from(states_of(tiny_8bit_dir, examples), EARLY)
    assert_resumes(tiny_8bit_dir, examples, checkpoints, monkeypatch, call, STOP, measure=measure)


def test_resuming_training_that_stopped_early_only_evaluates(tiny_8bit_dir, examples, checkpoints):
    measure = accuracy_from(states_of(tiny_8bit_dir, examples), EARLY)
    states, steps = checkpoints(3600.0), []
    wanted = trained(tiny_8bit_dir, examples, STOP, states, measure=measure)
    assert states.latest().step == 6
    log = lambda values, step: steps.append(step)  # noqa: E731
    assert_same(trained(tiny_8bit_dir, examples, STOP, states, log, measure), wanted)
    assert set(steps) == {6}


def considered(metric, measured, patience=None):
    """Return the best state after evaluations with the given (loss, accuracy), and the steps."""
    monitor = types.SimpleNamespace(eval_loss=math.nan, eval_accuracy=None)
    best, model = BestState(monitor, metric, patience), torch.nn.Linear(1, 1)
    control = types.SimpleNamespace(should_training_stop=False)
    for step, (loss, accuracy) in enumerate(measured, start=1):
        monitor.eval_loss, monitor.eval_accuracy = loss, accuracy
        best.on_evaluate(None, types.SimpleNamespace(global_step=step), control, model=model)
        if control.should_training_stop:
            break
    return best.step, step


@pytest.mark.parametrize(
    ("metric", "measured", "wanted"),
    [
        ("eval_accuracy", [(1.0, 0.5), (0.9, 0.5), (0.8, 0.4)], 2),  # equal: the lower loss
        ("eval_accuracy", [(1.0, 0.5), (1.0, 0.5)], 1),  # equal in both: the earlier
        ("eval_accuracy", [(0.1, 0.5), (9.0, 0.6)], 2),  # the loss does not matter otherwise
        ("eval_loss", [(1.0, 0.1), (1.0, 0.9)], 1),  # nor does the accuracy
        ("eval_loss", [(math.nan, None), (5.0, None), (math.nan, None)], 2),
        ("eval_accuracy", [(math.nan, 0.5), (3.0, 0.5)], 2),
    ],
)
def test_ties_and_missing_numbers(metric, measured, wanted):
    assert considered(metric, measured)[0] == wanted


def test_patience_counts_evaluations_without_a_better_metric():
    # A lower loss with the same accuracy is a better state, but not a better accuracy.
    measured = [(1.0, 0.5), (0.9, 0.5), (0.8, 0.5), (0.7, 0.9)]
    assert considered("eval_accuracy", measured, patience=2) == (3, 3)
    assert considered("eval_accuracy", measured, patience=3) == (4, 4)
    assert considered("eval_loss", measured, patience=1) == (4, 4)


def test_all_steps_as_warmup_is_refused_before_training(tiny_8bit_dir, examples, monkeypatch):
    monkeypatch.setattr(CompletionTrainer, "train", lambda *_: pytest.fail("training began"))
    few = {"num_train_epochs": 1, "per_device_train_batch_size": 6}  # a step of 12 rows
    with pytest.raises(UserError) as caught:
        trained(tiny_8bit_dir, examples, changed(**few, warmup_ratio=0.05))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("finetune.warmup_ratio = 0.05: training has 1 step, all warm-up")
    assert "set it to 0" in line
    for ratio, message in ((1.0, "= 1: training has 9 steps"), (0.9, "= 0.9: training has 9")):
        with pytest.raises(UserError, match=message):
            trained(tiny_8bit_dir, examples, changed(warmup_ratio=ratio))


@pytest.mark.parametrize(
    "allowed",
    [{"warmup_ratio": 0.0}, {"lr_scheduler_type": "constant"}, {"num_train_epochs": 2}],
    ids=str,
)
def test_training_with_steps_after_the_warmup_is_not_refused(tiny_8bit_dir, examples, allowed):
    few = {"num_train_epochs": 1, "per_device_train_batch_size": 6, "warmup_ratio": 0.05}
    weights, _ = trained(tiny_8bit_dir, examples, changed(**few | allowed))
    assert weights


def test_tokens_are_those_of_one_pass_without_padding(tiny_8bit_dir, examples):
    for settings in (BEST, changed(num_train_epochs=1, gradient_accumulation_steps=1)):
        _, result = trained(tiny_8bit_dir, examples, settings)
        assert result["tokens"] == sum(len(example["input_ids"]) for example in examples)
        learned = [end - start for start, end in (example["learned"] for example in examples)]
        assert result["learned_tokens"] == sum(learned)
    # The first token of running text has no loss, because nothing precedes it.
    text = [{**example, "learned": [0, len(example["input_ids"])]} for example in examples]
    _, result = trained(tiny_8bit_dir, text)
    assert result["learned_tokens"] == result["tokens"] - len(examples)
    assert result["tokens"] == int(lengths_of(text)[0].sum())
