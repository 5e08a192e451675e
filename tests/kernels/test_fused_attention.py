"""Compare fused attention with the eager attention of transformers."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPTJForCausalLM

from gptj8.kernels.fused import GPTJFusedAttention, register_fused_attention
from tests.conftest import gptj_config

IDS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 17:] = 0
LEFT = torch.ones_like(IDS)
LEFT[2, :9] = 0


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def pair(request):
    """Return the same model with transformers' eager attention and with fused attention."""
    register_fused_attention()
    torch.manual_seed(0)
    eager = GPTJForCausalLM._from_config(gptj_config(), attn_implementation="eager")
    fused = GPTJForCausalLM._from_config(gptj_config(), attn_implementation="sdpa")
    fused.load_state_dict(eager.state_dict())
    return eager.to(request.param).eval(), fused.to(request.param).eval()


def test_8bit_models_use_fused_attention_by_default(tiny_8bit_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    assert type(model.transformer.h[0].attn) is GPTJFusedAttention
    original = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir, attn_implementation="eager")
    assert type(original.transformer.h[0].attn) is not GPTJFusedAttention


@pytest.mark.parametrize(
    "mask", [None, MASK, LEFT], ids=["no-padding", "right-padded", "left-padded"]
)
def test_logits_and_gradients_match_transformers(pair, mask):
    eager, fused = pair
    tolerance = 1e-5 if next(eager.parameters()).dtype == torch.float32 else 3e-2
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    gradients = []
    for model in (eager, fused):
        logits = model(IDS, attention_mask=mask).logits[real]
        functional.cross_entropy(logits.float(), IDS[real]).backward()
        gradients.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (theirs, their_grads), (ours, our_grads) = gradients
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for name, gradient in their_grads.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_grads[name], gradient, rtol=0, atol=tolerance * scale)


def test_generation_is_the_same_with_and_without_a_cache(pair):
    _, fused = pair
    arguments = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    cached = fused.generate(IDS, attention_mask=LEFT, **arguments)
    if next(fused.parameters()).dtype == torch.float32:
        uncached = fused.generate(IDS, attention_mask=LEFT, use_cache=False, **arguments)
        assert torch.equal(cached, uncached)
        eager, _ = pair
        assert torch.equal(cached, eager.generate(IDS, attention_mask=LEFT, **arguments))
    assert cached.shape == (3, 36)


def test_dropout_is_applied_only_in_training():
    register_fused_attention()
    torch.manual_seed(0)
    config = gptj_config(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    model = GPTJForCausalLM._from_config(config, attn_implementation="sdpa")
    evaluated = copy.deepcopy(model).eval()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(evaluated(IDS).logits, evaluated(IDS).logits)
