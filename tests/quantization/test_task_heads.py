"""Heads that are not in the checkpoint stay in full precision when a model is quantized on load."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPTJConfig,
    LlamaConfig,
)

import gptj8
from gptj8.quantization.layers import Frozen8bitLinear
from gptj8.runtime.errors import QuantizationError

LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
GPTJ = GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)


def save_model(folder, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_weights_that_the_checkpoint_lacks_raise(tmp_path):
    """Llama's question answering model has another prefix, so nothing of the checkpoint fits."""
    save_model(tmp_path / "model", LLAMA)
    with pytest.raises(QuantizationError, match="the checkpoint has no tensor transformer"):
        AutoModelForQuestionAnswering.from_pretrained(
            tmp_path / "model", quantization_config=gptj8.Blockwise8bitConfig()
        )


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModelForSequenceClassification, "score"),
        (AutoModelForTokenClassification, "score"),
        (AutoModelForQuestionAnswering, "qa_outputs"),
    ],
    ids=["sequence", "token", "question"],
)
def test_new_heads_are_not_quantized(tmp_path, auto, head):
    save_model(tmp_path / "model", GPTJ if head == "qa_outputs" else LLAMA)
    model = auto.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        quantization_config=gptj8.Blockwise8bitConfig(),
    )
    layer = model.get_submodule(head)
    assert type(layer) is torch.nn.Linear and layer.weight.requires_grad
    assert torch.isfinite(layer.weight).all() and 0 < float(layer.weight.std()) < 0.1
    assert any(isinstance(module, Frozen8bitLinear) for module in model.modules())
    ids = torch.randint(1, 128, (2, 8))
    outputs = model(ids)
    logits = outputs.start_logits if head == "qa_outputs" else outputs.logits
    assert torch.isfinite(logits).all()

    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.get_submodule(head).weight, layer.weight)
    reloaded = again(ids)
    found = reloaded.start_logits if head == "qa_outputs" else reloaded.logits
    assert torch.equal(found, logits)
