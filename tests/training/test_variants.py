"""Test variants of training, LoRA+ and NEFTune: what they do, and that they resume exactly."""

import pytest
import torch

from gptj8.training.monitor import Monitor
from gptj8.training.settings import training_arguments
from gptj8.training.trainer import CompletionTrainer
from tests.helpers.training_rows import (
    adapted_model,
    assert_resumes,
    assert_same,
    changed,
    interrupted_at,
    trained,
    weights_of,
)

BEST = {"load_best_model_at_end": True}
VARIANTS = [
    {"loraplus_lr_ratio": 16.0, "learning_rate": 2e-3},
    {"loraplus_lr_ratio": 16.0, "learning_rate": 2e-3, "optim": "adamw_torch"},
    {"neftune_noise_alpha": 5.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("call", [9, 26])
def test_a_variant_resumes_exactly(
    tiny_8bit_dir, examples, checkpoints, monkeypatch, variant, call
):
    settings = changed(**BEST, **variant)
    assert_resumes(tiny_8bit_dir, examples, checkpoints, monkeypatch, call, settings)


@pytest.mark.parametrize(
    "adapter",
    [{"use_rslora": True}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"}],
    ids=str,
)
def test_lora_variants_resume_exactly(tiny_8bit_dir, examples, checkpoints, monkeypatch, adapter):
    settings = changed(**BEST)
    wanted = trained(tiny_8bit_dir, examples, settings, **adapter)
    plain = trained(tiny_8bit_dir, examples, settings)
    assert any(not torch.equal(wanted[0][name], weight) for name, weight in plain[0].items())
    states = checkpoints(None)
    with interrupted_at(monkeypatch, 26), pytest.raises(KeyboardInterrupt):
        trained(tiny_8bit_dir, examples, settings, states, **adapter)
    assert_same(trained(tiny_8bit_dir, examples, settings, states, **adapter), wanted)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch"])
def test_loraplus_gives_b_a_higher_learning_rate(tiny_8bit_dir, examples, optim, tmp_path):
    settings = changed(optim=optim, weight_decay=0.1)
    model = adapted_model(tiny_8bit_dir)
    trainer = CompletionTrainer(
        model=model,
        args=training_arguments(settings, tmp_path, model),
        eval_dataset=examples,
        monitor=Monitor(lambda values, step: None, None),
        checkpoints=None,
        loraplus_lr_ratio=4.0,
    )
    optimizer = trainer.create_optimizer()
    assert ("bitsandbytes" in type(optimizer).__module__) == (optim == "adamw_bnb_8bit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        assert not group["params"] or group["weight_decay"] == 0.1
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr"]
    assert set(found) == set(weights_of(model))
    for name, rate in found.items():
        factor = 4.0 if ".lora_B." in name else 1.0
        assert rate == pytest.approx(factor * settings.learning_rate), name


def test_noise_is_added_in_training_and_not_in_evaluation(tiny_8bit_dir, examples):
    seen = {True: [], False: []}
    original = CompletionTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        embeddings = model.get_base_model().get_input_embeddings()
        ids = inputs["input_ids"]
        seen[model.training].append(not torch.equal(embeddings(ids), embeddings.forward(ids)))
        return original(self, model, inputs, *args, **kwargs)

    def measure(model, batch_size):
        embeddings = model.get_base_model().get_input_embeddings()
        ids = torch.tensor([[1, 2, 3]])
        return float(torch.equal(embeddings(ids), embeddings.forward(ids)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompletionTrainer, "compute_loss", compute_loss)
        settings = changed(neftune_noise_alpha=5.0)
        _, result = trained(tiny_8bit_dir, examples, settings, measure=measure)
    assert len(seen[True]) == 18 and all(seen[True])
    assert len(seen[False]) == 18 and not any(seen[False])
    assert result["eval_accuracy"] == 1.0
    without = trained(tiny_8bit_dir, examples)[1]
    assert result["train_loss"] != without["train_loss"]


def test_noise_is_not_doubled_when_training_starts_again(
    tiny_8bit_dir, examples, checkpoints, monkeypatch
):
    """Trainer leaves its hook on the model if training ends with an error."""
    hooks = []

    def count(self, model, inputs, *args, original=CompletionTrainer.compute_loss, **kwargs):
        hooks.append(len(model.get_base_model().get_input_embeddings()._forward_hooks))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "compute_loss", count)
    with interrupted_at(monkeypatch, 9, torch.OutOfMemoryError("out of memory")):
        trained(tiny_8bit_dir, examples, changed(neftune_noise_alpha=5.0), checkpoints(None))
    assert len(hooks) > 18 and set(hooks) == {1}
