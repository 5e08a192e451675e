"""Compare fused activation functions with those of transformers."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from gptj8.kernels.fused import fuse_activations
from gptj8.model.loading import load_model
from gptj8.quantization.layers import Frozen8bitModule

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_values_and_gradients_match_transformers(name):
    original = nn.Sequential(ACT2FN[name])
    fused = nn.Sequential(ACT2FN[name])
    fuse_activations(fused)
    assert type(fused[0]) is nn.GELU
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    results = []
    for module, values in ((original, x), (fused, x), (fused, x.to(torch.bfloat16))):
        values = values.clone().requires_grad_()
        y = module(values)
        y.sum().backward()
        results.append((y, values.grad))
    expected, ours, rounded = results
    for one, other in zip(expected, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
    for one, other in zip(expected, rounded, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "gelu_pytorch_tanh"])
def test_other_activations_are_not_replaced(name):
    module = nn.Sequential(ACT2FN[name])
    before = module[0]
    fuse_activations(module)
    assert module[0] is before


def test_original_and_8bit_models_use_the_fused_activation(tiny_model_dir, tiny_8bit_dir):
    for folder in (tiny_model_dir, tiny_8bit_dir):
        model = load_model(folder, torch.float32, CPU)
        kinds = {type(m) for n, m in model.named_modules() if n.endswith(".act")}
        assert kinds == {nn.GELU}
    assert any(isinstance(m, Frozen8bitModule) for m in model.modules())
