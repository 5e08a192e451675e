"""Compare the chunked loss of a frozen head with cross-entropy on all logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from gptj8.quantization.codec import quantize_blockwise
from gptj8.quantization.twins import frozen_twin, full_precision_twin
from gptj8.training import loss
from gptj8.training.loss import frozen_cross_entropy, frozen_head, input_of

IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def heads(dtype=torch.float32):
    torch.manual_seed(0)
    original = nn.Linear(64, 500)
    frozen = frozen_twin(original, 64, torch.float32)
    frozen.load_quantized(quantize_blockwise(original.weight, 64))
    nn.init.normal_(frozen.bias)
    frozen.requires_grad_(False)
    return frozen.to(dtype), full_precision_twin(frozen, torch.float64)


@pytest.mark.parametrize("chunk", [1, 7 * 2000, 1 << 26], ids=["token", "seven-tokens", "all"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_value_and_gradient_match_float64(monkeypatch, dtype, tolerance, chunk, rows):
    monkeypatch.setattr(loss, "_CHUNK_BYTES", chunk)
    monkeypatch.setitem(loss._SLICE_LOGITS, "cpu", rows * 500)
    frozen, twin = heads(dtype)
    hidden = (2 * torch.randn(30, 64)).to(dtype)
    targets = torch.randint(0, 500, (30,))
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    value = frozen_cross_entropy(ours, targets, frozen)
    expected = functional.cross_entropy(twin(theirs), targets, reduction="sum")
    (value / 7).backward()
    (expected / 7).backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
    assert float(error) < tolerance


def test_loss_of_no_tokens_is_zero():
    frozen, _ = heads()
    hidden = torch.zeros(0, 64, requires_grad=True)
    value = frozen_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), frozen)
    value.backward()
    assert float(value) == 0.0 and hidden.grad.shape == (0, 64)


def test_autocast_computes_in_its_dtype():
    frozen, _ = heads()
    hidden, targets = torch.randn(30, 64), torch.randint(0, 500, (30,))
    exact = frozen_cross_entropy(hidden, targets, frozen)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = frozen_cross_entropy(hidden, targets, frozen)
    assert 0 < abs(float(rounded - exact)) < 2e-2 * float(exact)


def test_input_of_collects_inputs_and_restores_the_head(tiny_8bit_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    expected = model(IDS).logits
    head = frozen_head(model.requires_grad_(False))
    with input_of(head) as taken:
        model(IDS)
    assert torch.equal(head(taken[0]), expected)
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(RuntimeError), input_of(head):
        raise RuntimeError
    assert torch.equal(model(IDS).logits, expected)


def test_frozen_head_is_none_for_trained_or_full_precision_heads(tiny_8bit_dir, tiny_model_dir):
    load = AutoModelForCausalLM.from_pretrained
    plain = get_peft_model(load(tiny_8bit_dir), LoraConfig(target_modules=["q_proj"]))
    assert frozen_head(plain) is plain.get_base_model().lm_head
    adapted = get_peft_model(load(tiny_8bit_dir), LoraConfig(target_modules=["lm_head"]))
    assert frozen_head(adapted) is None
    config = LoraConfig(target_modules=["q_proj"], bias="all")
    assert frozen_head(get_peft_model(load(tiny_8bit_dir), config)) is None
    assert frozen_head(load(tiny_model_dir)) is None
