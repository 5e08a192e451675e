"""A conversion proves on a small copy that the model computes the same in 8 bits."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MarianForCausalLM,
    OPTConfig,
)
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


@pytest.mark.parametrize("kind", ["Gemma2", "OPT", "TiedLlama", "GPT2"])
def test_converted_models_with_layers_on_the_disk(kind, tmp_path):
    """accelerate replaces `forward` in hooked modules, and reads tied weights from the files."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "Gemma2": Gemma2Config(vocab_size=300, intermediate_size=128, head_dim=16, **sizes),
        "OPT": OPTConfig(vocab_size=300, ffn_dim=128, word_embed_proj_dim=64, **sizes),
        "TiedLlama": LlamaConfig(
            vocab_size=300, intermediate_size=128, tie_word_embeddings=True, **sizes
        ),
        "GPT2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4),
    }[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit").eval()(IDS).logits
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "8bit",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offloaded",
    ).eval()
    assert "disk" in offloaded.hf_device_map.values()
    torch.testing.assert_close(offloaded(IDS).logits, expected)


def test_a_model_whose_copy_cannot_train_is_not_proven(tmp_path, monkeypatch):
    config = LlamaConfig(**{**LARGE, "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1})

    def forward(self, *args, **kwargs):
        if kwargs.get("labels") is not None:
            raise AssertionError("this model is for inference")
        return original(self, *args, **kwargs)

    original = modeling_llama.LlamaForCausalLM.forward
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)
    with pytest.raises(NotProvenError, match="AssertionError: this model is for inference"):
        difference(on_meta(config), CONFIG)


def test_marian_has_a_second_vocabulary():
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 299, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = MarianConfig(vocab_size=300, decoder_ffn_dim=128, **sizes, **tokens)
    with torch.device("meta"):
        model = MarianForCausalLM(config)
    assert difference(model, CONFIG) is None


def test_an_inner_model_that_is_saved_by_itself_is_refused_too(tmp_path):
    config = LlamaConfig(**{**LARGE, "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1})
    config.head_dim = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit")
    model.model.save_pretrained(tmp_path / "inner")
    with safe_open(tmp_path / "inner" / "model.safetensors", "pt") as stored:
        assert len(stored.get_slice("layers.0.mlp.up_proj.weight").get_shape()) == 1
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "inner")(IDS)[0], model.model(IDS)[0])
    restored = model.dequantize()  # after `save_pretrained`, which changes config.dtype to a name
    assert restored.lm_head.weight.dtype == torch.float32


def test_a_converted_model_gets_a_new_head(tmp_path):
    config = LlamaConfig(**{**LARGE, "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1})
    config.head_dim, config.pad_token_id = 2, 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "8bit", num_labels=3)
    assert model.score.weight.dtype == torch.float32
    assert model(IDS).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocksize": 64}, "blocksize is not a setting"),
        ({"skip_modules": "lm_head"}, "skip_modules = 'lm_head' is not a list"),
        ({"embedding_block_size": 100}, "embedding_block_size = 100 is not one of"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        gptj8.Blockwise8bitConfig(**settings)
