"""Test training on the frozen model: batches, losses, accuracy, checkpointing and accumulation."""

import types

import pytest
import torch

from gptj8.dataset.prepared.examples import IGNORED, prompt_ids
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.export.reference_answers import compare_in_fresh_process, save_reference
from gptj8.model.adapters import AdapterSpec, add_adapter, trainable_parameters
from gptj8.model.loading import load_model
from gptj8.model.scoring.likelihood import label_accuracy, score_labels
from gptj8.quantization.layers import Frozen8bitModule
from gptj8.runtime.errors import UserError
from gptj8.training.batches import Collator
from gptj8.training.loop import train
from gptj8.training.monitor import Monitor
from gptj8.training.settings import TrainingSettings, training_arguments
from gptj8.training.trainer import CompletionTrainer
from tests.helpers.training_rows import CPU, ROWS, rows

SETTINGS = TrainingSettings(
    learning_rate=2e-2,
    num_train_epochs=6,
    per_device_train_batch_size=4,
    logging_steps=1,
    eval_steps=5,
)


@pytest.fixture(scope="module")
def encoder(tiny_model_dir):
    return TextEncoder.load(tiny_model_dir)


@pytest.fixture(scope="module")
def examples(tiny_model_dir):
    return rows(tiny_model_dir)


def adapted_model(folder, method="lora", target="all-linear", dtype=torch.float32):
    torch.manual_seed(0)
    return add_adapter(load_model(folder, dtype, CPU), AdapterSpec(method, target, 4, 8, 0.0))


def _collator(context=64):
    config = types.SimpleNamespace(n_positions=context)
    model = types.SimpleNamespace(config=config, device=CPU)
    return Collator(0, model)


def test_only_completion_tokens_are_learned(encoder, examples):
    batch = _collator()(examples[:3])
    for row, (_, completion) in enumerate(ROWS[:3]):
        learned = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert learned == [*encoder.encode(" " + completion), encoder.eos_id]
    assert encoder.decode(prompt_ids(examples[0])) == "the quick brown fox ="


def test_batches_are_right_padded_and_masked(examples):
    batch = _collator()(examples[:3])
    for row, example in enumerate(examples[:3]):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert set(batch["labels"][row, length:].tolist()) <= {IGNORED}


def _batch_shape(*lengths, context=64):
    rows = [{"input_ids": [1] * length, "learned": [0, length]} for length in lengths]
    return tuple(_collator(context)(rows)["input_ids"].shape)


def test_padded_lengths_are_multiples_of_16_within_the_context():
    assert [_batch_shape(1, n)[1] for n in (2, 15, 16, 17, 33)] == [16, 16, 16, 32, 48]
    assert _batch_shape(60, 61, context=62) == (2, 62)  # limited by the model's context
    assert _batch_shape(60, 61, context=50) == (2, 61)  # too long: the model raises the error


def test_rows_of_equal_length_are_not_padded():
    assert _batch_shape(17) == (1, 17)
    assert _batch_shape(17, 17) == (2, 17)


@pytest.mark.parametrize("method", ["lora", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_reduces_the_loss_and_keeps_the_base(tiny_8bit_dir, examples, method, dtype):
    model = adapted_model(tiny_8bit_dir, method, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    logged = []
    result = train(model, examples, examples, SETTINGS, 0, lambda v, s: logged.append((s, v)))
    losses = [point["loss"] for point in result.history if "loss" in point]
    assert result.steps == 18
    assert losses[-1] < losses[0] - 0.3
    assert result.eval_loss < losses[0]
    assert result.trainable_parameters == trainable_parameters(model)
    assert {s for s, v in logged if "loss" in v} == set(range(1, 19))
    assert [s for s, v in logged if "eval_loss" in v][:3] == [5, 10, 15]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("method", ["lora", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_is_measured_with_the_loss(tiny_8bit_dir, examples, encoder, method, dtype):
    model = adapted_model(tiny_8bit_dir, method, dtype=dtype)
    prompts = [prompt_ids(example) for example in examples]
    labels = [PromptEncoder(encoder, "{text} =", 64).completion_ids(c) for _, c in ROWS[:3]]
    modes, logged = [], []

    def accuracy(model, batch_size):
        modes.append(model.training)
        return label_accuracy(model, prompts, labels, [0, 1, 2] * 4, batch_size=batch_size)

    result = train(
        model, examples, examples, SETTINGS, 0, lambda v, s: logged.append((s, v)), accuracy
    )
    points = [point for point in result.history if "eval_loss" in point]
    assert [point["step"] for point in points] == [5, 10, 15, 18]
    assert [v["eval_accuracy"] for _, v in logged if "eval_accuracy" in v] == [
        point["eval_accuracy"] for point in points
    ]
    assert modes == [False] * 4
    assert result.eval_accuracy == points[-1]["eval_accuracy"]
    if method == "lora":
        assert points[0]["eval_accuracy"] < result.eval_accuracy == 1.0
    if dtype == torch.float32:
        scores = score_labels(model.eval(), prompts, labels, batch_size=4, description=None)
        assert (scores.argmax(1) == [0, 1, 2] * 4).mean() == result.eval_accuracy


def test_final_evaluation_runs_once(tiny_8bit_dir, examples):
    settings = TrainingSettings(**{**SETTINGS.__dict__, "eval_steps": 9, "max_eval_samples": 2})
    result = train(adapted_model(tiny_8bit_dir), examples, examples, settings, 0)
    points = [point for point in result.history if "eval_loss" in point]
    assert [point["step"] for point in points] == [9, 18]
    assert result.eval_loss == points[-1]["eval_loss"]
    settings = TrainingSettings(**{**SETTINGS.__dict__, "eval_steps": 9})
    two = train(adapted_model(tiny_8bit_dir), examples, examples[:2], settings, 0)
    assert result.eval_loss == two.eval_loss
    twelve = train(adapted_model(tiny_8bit_dir), examples, examples, settings, 0)
    assert result.eval_loss != twelve.eval_loss


def test_speed_counts_only_training_tokens(tiny_8bit_dir, examples):
    result = train(adapted_model(tiny_8bit_dir), examples, examples * 5, SETTINGS, 0)
    tokens = sum(len(e["input_ids"]) for e in examples) * SETTINGS.num_train_epochs
    seconds = tokens / result.tokens_per_second
    assert result.samples_per_second * seconds == pytest.approx(len(examples) * 6)
    assert 0 < seconds < result.seconds


@pytest.mark.parametrize("checkpointing", ["none", "selective", "reuse"])
def test_checkpointing_does_not_change_the_result(tiny_8bit_dir, examples, checkpointing):
    def adapter_after(**changes):
        model = adapted_model(tiny_8bit_dir)
        train(model, examples, examples, TrainingSettings(**{**SETTINGS.__dict__, **changes}), 0)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    base = adapter_after(checkpointing="full")
    again = adapter_after(checkpointing=checkpointing)
    for name in base:
        assert torch.equal(base[name], again[name]), name


def test_default_optimizer_is_8bit_adam(tiny_8bit_dir, examples, monkeypatch):
    import bitsandbytes.optim as optim

    steps = []
    original = optim.AdamW.step
    monkeypatch.setattr(
        optim.AdamW, "step", lambda self, *a, **k: (steps.append(self), original(self, *a, **k))[1]
    )
    train(adapted_model(tiny_8bit_dir), examples, examples, SETTINGS, 0)
    assert steps and steps[0].args.optim_bits == 8


@pytest.mark.parametrize(
    ("target", "modules"),
    [
        ("attention", {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}),
        (["fc_in"], {"fc_in"}),
    ],
    ids=["attention", "all-linear", "a-list"],
)
def test_targets(tiny_8bit_dir, target, modules):
    model = adapted_model(tiny_8bit_dir, target=target)
    adapted = {n.split(".")[-2] for n, _ in model.named_modules() if n.endswith("lora_A")}
    assert adapted == modules
    assert isinstance(model.get_base_model().lm_head, Frozen8bitModule)


def test_unknown_target_raises(tiny_8bit_dir):
    for target in (["query"], ["q_proj", "query"]):
        with pytest.raises(UserError, match=r"no module query; .*: wte, .*q_proj, .*lm_head$"):
            adapted_model(tiny_8bit_dir, target=target)
    with pytest.raises(UserError, match="no module qproj, did you mean q_proj"):
        adapted_model(tiny_8bit_dir, target=["qproj"])


def test_reloaded_adapter_equals_the_trained_model(tiny_8bit_dir, examples, tmp_path):
    model = adapted_model(tiny_8bit_dir)
    train(model, examples, examples, SETTINGS, 0)
    prompts = [prompt_ids(e) for e in examples[:3]]
    model.save_pretrained(tmp_path)
    save_reference(tmp_path, model, prompts, [0])
    arguments = (tmp_path, tiny_8bit_dir)
    assert compare_in_fresh_process(*arguments, tmp_path, torch.float32, CPU) == {
        "max_logit_difference": 0.0,
        "compared_prompts": 3,
        "identical_generations": 3,
    }
    untrained = compare_in_fresh_process(*arguments, None, torch.float32, CPU)
    assert untrained["max_logit_difference"] > 0.1
    assert untrained["identical_generations"] < 3


@pytest.mark.parametrize("items", [None, 50], ids=["mean", "of-accumulated-tokens"])
def test_loss_equals_the_models_own_loss(tiny_8bit_dir, examples, items, tmp_path):
    model = adapted_model(tiny_8bit_dir)
    batch = _collator()(examples[:3])
    trainer = CompletionTrainer(
        model=model,
        args=training_arguments(SETTINGS, tmp_path, model),
        eval_dataset=examples,
        monitor=Monitor(lambda values, step: None, None),
        checkpoints=None,
    )
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    ours.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    theirs = model(**batch).loss * (learned / (items or learned))
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_accumulated_gradients_equal_a_larger_batch(tiny_8bit_dir, examples):
    def adapter_after(batch_size, accumulation):
        model = adapted_model(tiny_8bit_dir)
        changes = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1,
            "optim": "adamw_torch",
        }
        train(model, examples, examples, TrainingSettings(**{**SETTINGS.__dict__, **changes}), 0)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    large, accumulated = adapter_after(12, 1), adapter_after(3, 4)
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-3, atol=1e-4, msg=name)
