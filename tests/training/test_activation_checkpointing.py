"""Test what each kind of activation checkpointing recomputes."""

import pytest
import torch
import transformers

import gptj8
from gptj8.kernels import dispatch, operators
from gptj8.memory.estimate import Estimator, Plan
from gptj8.memory.fitting import choose_fit
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model
from gptj8.params.sections import parse_params
from gptj8.runtime import process
from gptj8.training.activation_checkpointing import KINDS, set_checkpointing
from gptj8.training.fit import Fit
from tests.helpers.architectures import ARCHITECTURES, COMMON

BLOCKS = {"gptj": 6, "llama": 7, "gpt2": 4}  # matrix products per block


def gradients_and_products(model, kind, monkeypatch):
    """Return the gradients of a step and the number of matrix products in forward and backward."""
    products = []
    restored_pieces = operators._restored_pieces
    with monkeypatch.context() as patch:

        def counted(*arguments):
            products.append(arguments)
            return restored_pieces(*arguments)

        patch.setattr(operators, "_restored_pieces", counted)
        # Only restored matrices can be kept.
        patch.setattr(dispatch, "most_rows", lambda *_: 0)
        set_checkpointing(model, kind)
        model.zero_grad()
        torch.manual_seed(0)  # for dropout
        ids = torch.arange(60).view(2, 30)
        model(input_ids=ids, labels=ids).loss.backward()
        assert not operators.kept_bytes()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], len(products)


@pytest.mark.parametrize("target", ["attention", "all-linear"])
@pytest.mark.parametrize("architecture", BLOCKS)
def test_selective_recomputes_no_matrix_product(architecture, target, monkeypatch, tmp_path):
    name, sizes = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, **COMMON)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=gptj8.Blockwise8bitConfig(block_size=256)
    )
    model = add_adapter(model, AdapterSpec("lora", target, 4, 8, 0.0)).train()
    found = {kind: gradients_and_products(model, kind, monkeypatch) for kind in KINDS["cuda"]}
    counts = {kind: products for kind, (_, products) in found.items()}
    assert counts["selective"] == counts["none"]
    every = config.num_hidden_layers * BLOCKS[architecture]
    if target == "all-linear":
        assert counts["full"] == counts["none"] + every
        assert counts["reuse"] == 2 * (every + 1)  # +1: the head, which is not checkpointed
    else:
        # The first block's MLP needs no gradient, and a block's last product may be skipped.
        assert counts["none"] < counts["full"] <= counts["none"] + every
        assert counts["reuse"] < counts["full"]
    for kind in KINDS["cuda"]:
        for gradient, expected in zip(found[kind][0], found["none"][0], strict=True):
            assert torch.equal(gradient, expected), kind


def test_retained_graph_gives_the_same_gradients_twice(tiny_8bit_dir):
    model = load_model(tiny_8bit_dir, torch.float32, torch.device("cpu"))
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8)).train()
    set_checkpointing(model, "reuse")
    ids = torch.arange(60).view(2, 30)
    loss = model(input_ids=ids, labels=ids).loss
    weights = [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    assert not operators.kept_bytes()
    for first, second in zip(once, torch.autograd.grad(loss, weights), strict=True):
        assert torch.equal(first, second)


OLMO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "clip_qkv": 1.0,  # clips the outputs of matrix products in place
}


def test_selective_is_not_chosen_for_models_that_change_outputs_in_place():
    config = transformers.OlmoConfig(**OLMO, **COMMON)
    shape = AdapterSpec("lora", ["gate_proj"], 4, 8.0, 0.0)
    plan = Plan(
        config, gptj8.Blockwise8bitConfig(block_size=256), shape, torch.float32, "cpu", 32, 31
    )
    estimator = Estimator(plan)
    with pytest.raises(RuntimeError, match="selective activation checkpoint") as caught:
        estimator.training(1, "selective")
    assert "set it to full or none" in process._explain(caught.value)
    finetune = parse_params({"data": {"train": "x"}, "model": {"path": "y"}}).finetune
    assert choose_fit(estimator, finetune, 2 * estimator.training(8, "none").total - 2) == Fit(
        8, "full"
    )
