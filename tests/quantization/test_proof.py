"""A conversion proves on a small copy that the model computes the same in 8 bits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Gemma3TextConfig, LlamaConfig
from transformers.models.llama import modeling_llama

import gptj8
from gptj8.quantization.layers import Frozen8bitLinear
from gptj8.quantization.proof import NotProvenError, build_small_copy, difference
from gptj8.runtime.errors import UserError

CONFIG = gptj8.Blockwise8bitConfig()
IDS = torch.arange(2, 26).view(2, 12)
LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "eos_token_id": 128_001,
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_large_model_is_proven_on_a_small_copy():
    model = on_meta(LlamaConfig(**LARGE))
    small = build_small_copy(model, IDS)
    assert type(small) is type(model)
    assert small.config.head_dim == model.config.head_dim
    assert small.num_parameters() < 20_000_000 < model.num_parameters() / 100
    assert difference(model, CONFIG) is None


def test_every_kind_of_layer_is_in_the_copy():
    model = on_meta(Gemma3TextConfig(num_hidden_layers=26, vocab_size=262_144))
    small = build_small_copy(model, IDS)
    assert set(small.config.layer_types) == set(model.config.layer_types)
    assert difference(model, CONFIG) is None


CASTS = {
    "factor": lambda mlp, x: mlp.down_proj(x) * torch.tensor(1.7).to(mlp.up_proj.weight.dtype),
    "activations": lambda mlp, x: mlp.down_proj(x.to(mlp.down_proj.weight.dtype)),
    "product": lambda mlp, x: x @ mlp.down_proj.weight.T,
}


@pytest.mark.parametrize("kind", CASTS)
def test_a_model_that_uses_a_weight_itself_is_refused(kind, tmp_path, monkeypatch):
    def forward(self, x):
        return CASTS[kind](self, self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=200, num_attention_heads=4, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"skip_modules") as raised:
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    if kind == "factor":
        assert "something else in 8 bits, first in model.layers.0.mlp;" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_built_small_is_said_to_be_not_proven(tmp_path, monkeypatch):
    config = LlamaConfig(**{**LARGE, "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1})
    config.head_dim = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("gptj8.quantization.proof._LARGEST", 1000)
    with pytest.raises(NotProvenError, match=r"it has [\d,]+ parameters"):
        difference(on_meta(config), CONFIG)
    report = gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    assert "not proven on a small copy (it has" in gptj8.quantization.conversion.summarize(report)


def test_falcon_and_routers():
    """Falcon's own linear layer is one; a router computes something else and stays as it is."""
    falcon = on_meta(FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
    gptj8.quantization.quantizer.swap_modules(falcon, CONFIG)
    assert isinstance(falcon.transformer.h[0].mlp.dense_h_to_4h, Frozen8bitLinear)
    assert difference(falcon, CONFIG) is None
