"""Scales in 8 bits: levels, rounding, and what they do to the error and to a model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptj8
from gptj8.quantization.codec import SEARCHED_LEVELS, quantize_blockwise, squared_errors
from gptj8.quantization.scales import encode_scales, fit_levels
from gptj8.runtime.errors import QuantizationError

OLD_FORMAT = gptj8.Blockwise8bitConfig(256, "fitted", None, 256, 32)


def some_scales(count=5000, low=1e-4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, generator=generator) * (1 - low) + low


def error(weight, block_size, scale_bits):
    quantized = quantize_blockwise(weight, block_size, scale_bits=scale_bits)
    wrong, norm = squared_errors(weight, quantized)
    return math.sqrt(wrong / norm)


def test_levels_are_geometric_from_the_largest_scale_to_the_smallest():
    scales = some_scales()
    levels = fit_levels(scales)
    largest, smallest = scales.max().double(), scales.min().double()
    steps = torch.arange(255, -1, -1).double() / 256
    expected = largest * (smallest / largest) ** steps
    torch.testing.assert_close(levels.double(), expected, rtol=1e-6, atol=0)
    assert levels[-1] == scales.max()
    assert (levels[1:] > levels[:-1]).all()


def test_a_scale_is_rounded_up_to_the_nearest_level():
    scales = some_scales()
    levels = fit_levels(scales)
    codes = encode_scales(scales, levels).long()
    rounded = levels[codes]
    assert (rounded >= scales).all()
    below = torch.where(codes > 0, levels[codes - 1], torch.zeros(1))
    assert (below < scales).all()
    assert (rounded / scales).max() < (1 / 1e-4) ** (1 / 256) * 1.00001


def test_levels_are_byte_identical_everywhere():
    """The digest of levels that exact operations give; another machine must find the same."""
    digest = hashlib.sha256(fit_levels(some_scales()).numpy().tobytes()).hexdigest()
    # The same in NumPy, whose square roots and products are rounded by other code.
    scales = some_scales().numpy()
    step = np.float64(scales.min()) / np.float64(scales.max())
    for _ in range(8):
        step = np.sqrt(step)
    factors = np.concatenate([[1.0], np.cumprod(np.full(255, step))])
    expected = (np.float64(scales.max()) * factors)[::-1].astype(np.float32)
    assert digest == hashlib.sha256(expected.tobytes()).hexdigest()


@pytest.mark.parametrize(
    "scales",
    [[0.0, 0.0], [3.0, 3.0], [0.0, 2.0], [1e-38, 1.0], [1e-30, 1e-30], [3e38, 1e-3], []],
    ids=str,
)
def test_extreme_scales(scales):
    scales = torch.tensor(scales)
    levels = fit_levels(scales)
    assert levels.shape == (256,) and torch.isfinite(levels).all()
    assert (levels[1:] >= levels[:-1]).all()
    assert (levels[encode_scales(scales, levels).long()] >= scales).all()


def test_zeros_stay_zero_and_weights_are_not_clipped():
    weight = torch.randn(64, 64) * torch.logspace(-12, 3, 64)[:, None]
    weight[5] = 0.0
    weight[7, :40] = 0.0
    quantized = quantize_blockwise(weight, 32, scale_bits=8)
    restored = gptj8.dequantize_blockwise(quantized)
    assert (restored[weight == 0] == 0).all()
    largest = weight.abs().view(-1, 32).amax(1)
    assert (quantized.scales >= largest).all()


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["equal-rows", "rows-of-different-size"])
def test_small_blocks_with_8_bit_scales_beat_larger_ones_of_the_same_size(spread):
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp(spread * torch.randn(1024, 1, generator=generator))
    weight = torch.randn(1024, 512, generator=generator) * rows
    # Both formats take 8.125 bits per weight.
    assert error(weight, 64, 8) < 0.95 * error(weight, 256, 32)
    # The scales cost little.
    assert error(weight, 64, 8) < 1.05 * error(weight, 64, 32)


def errors_of_levels(weight, quantized, candidates):
    """Return float64 (candidates, blocks), squared errors with each level from the lowest one."""
    blocks = weight.view(-1, quantized.block_size)
    lowest = encode_scales(blocks.abs().amax(1), quantized.levels).int()
    found = []
    for step in range(candidates):
        scale = quantized.levels[(lowest + step).clamp(max=255)][:, None].double()
        distance = (blocks.double() / scale)[..., None] - quantized.codebook.double()
        found.append((distance.abs().amin(2) * scale).square().sum(1))
    return torch.stack(found), lowest


@pytest.mark.parametrize("block_size", [32, 128])
def test_each_block_gets_the_level_with_the_smallest_error(block_size):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantized = quantize_blockwise(weight, block_size, scale_bits=8)
    errors, lowest = errors_of_levels(weight, quantized, SEARCHED_LEVELS)
    chosen = (quantized.absmax.int() - lowest).long()
    assert chosen.min() >= 0
    actual = errors.gather(0, chosen[None])[0]
    # Errors are compared with a resolution of 1 / 65536 of the scale.
    assert (actual <= errors.amin(0) * 1.05).all()
    assert actual.sum() <= errors.amin(0).sum() * 1.001
    assert actual.sum() < (0.88 if block_size == 32 else 0.96) * errors[0].sum()


def test_size_of_a_converted_model(tiny_model_dir, tmp_path):
    gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "out", gptj8.Blockwise8bitConfig())
    state = load_file(tmp_path / "out" / "model.safetensors")
    weights = {name for name, tensor in state.items() if name.endswith("weight")}
    for name in {n for n in weights if state[n].dtype == torch.uint8}:
        module = name.removesuffix(".weight")
        is_embedding = "wte" in module or "lm_head" in module
        blocks = math.ceil(state[name].numel() / (32 if is_embedding else 128))
        assert state[f"{module}.absmax"].dtype == torch.uint8
        assert state[f"{module}.absmax"].shape == (blocks,)
        assert state[f"{module}.levels"].dtype == torch.float32


def test_conversions_of_earlier_versions_load_unchanged(tiny_model_dir, tmp_path):
    gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "new", OLD_FORMAT)
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    content = json.loads((old / "config.json").read_text())
    for key in ("embedding_block_size", "scale_bits"):
        del content["quantization_config"][key]
    (old / "config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(old)
    assert model.config.quantization_config.scale_bits == 32
    stored = load_file(old / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name].view(tensor.shape)), name
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    ids = torch.arange(20)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scale_bits", [0, 4, 16, 8.0, True, "8"], ids=repr)
def test_invalid_scale_bits_raise(scale_bits):
    with pytest.raises(QuantizationError, match="scale_bits = "):
        quantize_blockwise(torch.ones(10), scale_bits=scale_bits)
    with pytest.raises(QuantizationError, match="scale_bits = "):
        gptj8.Blockwise8bitConfig(scale_bits=scale_bits)
