"""Scales per input column: what they do to errors, layers, loading, training and merging."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

import gptj8
from gptj8.commands.main import main
from gptj8.export.merging import merge
from gptj8.quantization.calibration import (
    choose_scales,
    input_sizes,
    read_sequences,
    scales_for,
)
from gptj8.quantization.layers import Frozen8bitEmbedding, Frozen8bitModule
from gptj8.quantization.quantizer import quantize_for
from gptj8.quantization.twins import frozen_twin, full_precision_twin
from gptj8.runtime.errors import QuantizationError, UserError
from tests.conftest import make_tokenizer

CONFIG = gptj8.Blockwise8bitConfig(block_size=32)
TEXT = "\n".join(f"The {i} th sentence says what number {i * i} is about." for i in range(200))
IDS = torch.randint(2, 190, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaConfig(**{"vocab_size": 384, "num_attention_heads": 4, **sizes, **changes})


def gpt2():
    return GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=64)


MODELS = {"tied": llama(tie_word_embeddings=True), "untied": llama(), "conv1d": gpt2()}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def saved(config, folder):
    """Save a model in which a few columns get much larger inputs, as in trained models."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    large = torch.where(torch.arange(64) % 32 == 7, 30.0, 1.0)
    for name, parameter in model.named_parameters():
        if ("norm" in name or "ln_" in name) and name.endswith("weight"):
            parameter.data *= large
    model.save_pretrained(folder)
    make_tokenizer(folder, 384)
    return model.eval()


@pytest.fixture(params=MODELS)
def calibrated(request, text, tmp_path):
    """Return the original model, a plain 8-bit model and a calibrated one."""
    original = saved(MODELS[request.param], tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "plain", CONFIG)
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG, text)
    folders = tmp_path / "plain", tmp_path / "8bit"
    return original, *(AutoModelForCausalLM.from_pretrained(f).eval() for f in folders)


def test_powers_of_two_near_the_square_root():
    sums = torch.tensor([1.0, 16.0, 256.0, 4096.0, 65536.0], dtype=torch.float64)
    assert scales_for(sums, 0.5).tolist() == [4.0, 2.0, 1.0, 0.5, 0.25]
    assert scales_for(sums, 0.0).tolist() == [1.0] * 5
    assert scales_for(torch.zeros(3, dtype=torch.float64), 0.5).tolist() == [1.0, 1.0, 1.0]
    wide = scales_for(torch.tensor([0.0, 1e-30, 1.0, 1e30], dtype=torch.float64), 0.75)
    assert torch.isfinite(wide).all() and (wide > 0).all()
    assert torch.equal(wide.log2().round().exp2(), wide)


@pytest.mark.parametrize("inputs", ["outliers", "spread", "equal"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_error_of_the_outputs_falls_or_stays(kind, inputs):
    generator = torch.Generator().manual_seed(0)
    size = {
        "outliers": torch.where(torch.arange(256) % 50 == 7, 30.0, 1.0),
        "spread": torch.logspace(-1, 1, 256)[torch.randperm(256, generator=generator)],
        "equal": torch.ones(256),
    }[inputs]
    weight = torch.randn(300, 256, generator=generator)
    x = torch.randn(2000, 256, generator=generator) * size
    original = nn.Linear(256, 300) if kind == "linear" else Conv1D(300, 256)
    original.weight.data = weight if kind == "linear" else weight.T.contiguous()
    frozen = frozen_twin(original, 32, torch.float32, 8)
    errors = []
    for scales in (
        None,
        choose_scales(frozen, original.weight, x.double().square().sum(0), CONFIG),
    ):
        frozen.input_scales = scales
        frozen.load_quantized(quantize_for(frozen, original.weight, CONFIG, "weight"))
        restored = frozen.restore(torch.float32)
        difference = restored - original.weight
        errors.append(float((x @ (difference.T if kind == "linear" else difference)).norm()))
    # A block of Conv1D is a part of one column, so a scale per column changes nothing in it.
    if inputs == "outliers" and kind == "linear":
        assert errors[1] < 0.7 * errors[0]
    assert errors[1] <= 1.001 * errors[0]


def test_a_calibrated_model_equals_its_restored_twin(calibrated, tmp_path):
    _, _, model = calibrated
    linear = [m for m in model.modules() if isinstance(m, Frozen8bitModule)]
    assert any(m.input_scales is not None and len(set(m.input_scales.tolist())) > 2 for m in linear)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).eval()
    gradients = []
    with torch.no_grad():
        actual = model(IDS).logits
        assert torch.equal(again(IDS).logits, actual)
    twin = again.dequantize()
    torch.testing.assert_close(twin(IDS).logits, actual, rtol=1e-4, atol=1e-5)
    twin_in_half = half.dequantize(torch.bfloat16)
    torch.testing.assert_close(twin_in_half(IDS).logits.float(), actual, rtol=0.1, atol=0.1)
    for base in (model, twin):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config).eval()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_tied_embedding_uses_the_scales_of_the_head(text, tmp_path):
    saved(MODELS["tied"], tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG, text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Frozen8bitEmbedding)
    assert embedding.input_scales.data_ptr() == head.input_scales.data_ptr()
    assert torch.equal(embedding(torch.arange(384)), head.restore(torch.float32))


def test_scales_follow_the_inputs(text, tmp_path):
    original = saved(llama(), tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)
    found = input_sizes(tmp_path / "8bit", read_sequences(tmp_path / "8bit", text))
    assert not any("embed" in name for name in found)
    gain = original.model.layers[0].input_layernorm.weight
    sums = found["model.layers.0.self_attn.q_proj"]
    assert sums[gain > 1].mean() > 100 * sums[gain <= 1].mean()
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "calibrated", CONFIG, text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated")
    scales = model.model.layers[0].self_attn.q_proj.input_scales
    assert scales[gain > 1].mean() <= 0.5 * scales[gain <= 1].mean()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layers_with_input_scales(kind):
    original = nn.Linear(64, 40) if kind == "linear" else Conv1D(40, 64)
    frozen = frozen_twin(original, 32, torch.float32, 8)
    frozen.allocate_input_scales()
    frozen.input_scales = torch.exp2(torch.arange(64) % 5 - 2.0)
    frozen.load_quantized(
        gptj8.quantize_blockwise(frozen.scaled(original.weight), 32, scale_bits=8)
    )
    frozen.bias = original.bias
    x = torch.randn(50, 64)
    for dtype in (torch.float32, torch.bfloat16):
        twin = full_precision_twin(frozen.to(dtype), torch.float32)
        assert frozen.input_scales.dtype == torch.float32
        assert (twin.weight - original.weight).norm() < 0.02 * original.weight.norm()
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        actual = frozen(x.to(dtype)).float()
        torch.testing.assert_close(actual, twin(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 128"),
        (b"three short words", "at least 128"),
        (b"\xff\xfe" * 99, "cannot be"),
    ],
    ids=["empty", "short", "not-utf8"],
)
def test_unusable_texts_are_refused_before_the_conversion(text, tmp_path, content, message):
    saved(llama(), tmp_path / "model")
    text.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG, text)
    assert "text.txt" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"missing\.txt cannot be read"):
        gptj8.convert_checkpoint(
            tmp_path / "model", tmp_path / "8bit", CONFIG, tmp_path / "missing.txt"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_on_the_fly_needs_a_conversion(tmp_path):
    saved(llama(), tmp_path / "model")
    config = gptj8.Blockwise8bitConfig(input_scales=True)
    with pytest.raises(QuantizationError, match="gptj8 convert --calibration"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)


def test_the_command(text, tmp_path, monkeypatch):
    saved(llama(), tmp_path / "model")
    out = str(tmp_path / "out")
    arguments = ["convert", str(tmp_path / "model"), out, "--calibration", str(text)]
    monkeypatch.setattr(sys, "argv", ["gptj8", *arguments])
    main()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.input_scales
    assert model.lm_head.input_scales is not None
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "text.txt"}


def test_modules_that_are_not_called_get_ones(text, tmp_path):
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=384, decoder_ffn_dim=128, max_position_embeddings=128, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model", 384)
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG, text)
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit").model.decoder.layers[0]
    assert layer.encoder_attn.k_proj.input_scales.tolist() == [1.0] * 64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").write_text("[]"), "which cannot be loaded"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
        (lambda f: make_tokenizer(f, 500), r"the tokenizer has token \d+, but the model only"),
    ],
    ids=["broken", "none", "larger"],
)
def test_unusable_tokenizers_are_refused_before_the_conversion(text, tmp_path, damage, message):
    saved(llama(vocab_size=258), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as raised:
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "new" / "8bit", CONFIG, text)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_an_error_leaves_no_folders(text, tmp_path):
    saved(llama(), tmp_path / "model")
    config = gptj8.Blockwise8bitConfig(skip_modules=["nothing"])
    with pytest.raises(UserError, match="has no such module"):
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "a" / "b" / "c", config, text)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="needs a calibration text"):
        gptj8.convert_checkpoint(
            tmp_path / "model", tmp_path / "c", gptj8.Blockwise8bitConfig(input_scales=True)
        )


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_merging_an_adapter_of_a_tied_weight(text, tmp_path, targets):
    saved(MODELS["tied"], tmp_path / "model")
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG, text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit")
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "8bit", tmp_path / "adapter", tmp_path / "merged", torch.float16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = adapted(IDS).logits
    assert (merged(IDS).logits - expected).norm() < 0.01 * expected.norm()
