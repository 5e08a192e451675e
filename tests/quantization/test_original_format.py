"""Test the conversion of models in the original 8-bit GPT-J format, created like the original."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPTJForCausalLM

import gptj8
from gptj8.quantization.codec import QuantizationError, dequantize_blockwise, quantize_blockwise
from gptj8.runtime.errors import UserError
from tests.conftest import gptj_config

CONFIG = gptj8.Blockwise8bitConfig()  # has no effect on modules whose codes are kept
IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def full_precision_model():
    """Return a model wide enough for several blocks of 4096 per matrix."""
    torch.manual_seed(1)
    return GPTJForCausalLM(gptj_config(n_embd=96, n_layer=2)).eval()


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def legacy_state(model: nn.Module, adapter_rank: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict as saved by the original code."""
    state = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            q = quantize_blockwise(module.weight, 4096, "dynamic")
            state |= {
                f"{name}.weight": q.codes,
                f"{name}.absmax": q.absmax,
                f"{name}.code": q.codebook,
            }
            if getattr(module, "bias", None) is not None:
                state[f"{name}.bias"] = module.bias.detach()
            if adapter_rank:
                rows, width = module.weight.shape
                embedding = isinstance(module, nn.Embedding)
                first = (rows, adapter_rank) if embedding else (adapter_rank, width)
                state[f"{name}.adapter.0.weight"] = torch.randn(first) / 10
                state[f"{name}.adapter.1.weight"] = torch.randn(
                    width if embedding else rows, adapter_rank
                )
        elif isinstance(module, nn.LayerNorm):
            state |= {
                f"{name}.weight": module.weight.detach(),
                f"{name}.bias": module.bias.detach(),
            }
    for layer in range(model.config.n_layer):
        prefix = f"transformer.h.{layer}.attn"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
    return state


def save_legacy(folder, state, model):
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


def legacy_logits(model, state):
    """Compute logits like the original code: restored weights plus unscaled adapters."""
    for name, module in model.named_modules():
        if is_quantized(module):
            q = gptj8.quantization.codec.QuantizedTensor(
                state[f"{name}.weight"], state[f"{name}.absmax"], state[f"{name}.code"], 4096
            )
            weight = dequantize_blockwise(q)
            if f"{name}.adapter.0.weight" in state:
                first, second = (state[f"{name}.adapter.{i}.weight"] for i in (0, 1))
                update = first @ second.T if isinstance(module, nn.Embedding) else second @ first
                weight = weight + update
            module.weight.data = weight
    return model(IDS).logits


def test_codes_are_kept_byte_identical(tmp_path):
    model = full_precision_model()
    state = legacy_state(model)
    save_legacy(tmp_path / "old", state, model)
    report = gptj8.convert_checkpoint(tmp_path / "old", tmp_path / "new", CONFIG)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    for name, module in loaded.named_modules():
        if f"{name}.code" in state:
            assert torch.equal(module.weight, state[f"{name}.weight"]), name
            assert torch.equal(module.absmax, state[f"{name}.absmax"]), name
            assert torch.equal(module.codebook, state[f"{name}.code"]), name
    torch.testing.assert_close(
        loaded(IDS).logits, legacy_logits(model, state), rtol=1e-5, atol=1e-5
    )
    assert report.tensors == []
    assert not (tmp_path / "new" / "adapter").exists()
    assert (
        json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"][
            "block_size"
        ]
        == 4096
    )


def test_adapters_are_kept(tmp_path):
    model = full_precision_model()
    state = legacy_state(model, adapter_rank=3)
    save_legacy(tmp_path / "old", state, model)
    gptj8.convert_checkpoint(tmp_path / "old", tmp_path / "new", CONFIG)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    without = base(IDS).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "new" / "adapter").eval()
    expected = legacy_logits(model, state)
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert float((without - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("absmax", lambda t: t[:-1], r"absmax has 2 values.*block size"),
        ("code", lambda t: t[:255], r"q_proj\.weight: the codebook has shape \(255,\)"),
        ("code", lambda t: t.flip(0), "not ascending"),
        ("weight", lambda t: t.float(), "codes are torch.float32"),
    ],
    ids=["absmax-short", "code-short", "code-descending", "codes-float"],
)
def test_damaged_parts_raise_and_are_named(tmp_path, part, change, message):
    model = full_precision_model()
    state = legacy_state(model)
    name = f"transformer.h.1.attn.q_proj.{part}"
    state[name] = change(state[name]).contiguous()
    save_legacy(tmp_path / "old", state, model)
    with pytest.raises((UserError, QuantizationError), match=message):
        gptj8.convert_checkpoint(tmp_path / "old", tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "old")
    assert not list(tmp_path.iterdir())
