"""Packed label scores equal a separate forward pass for each pair of prompt and label."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gptj8.model.scoring import likelihood
from gptj8.model.scoring.likelihood import is_packable, score_labels, score_labels_one_by_one
from gptj8.runtime.errors import UserError

# One token, several tokens, a label that starts with the tokens of another one, and a duplicate.
LABELS = [[5], [7, 0], [7, 9, 11, 0], [23, 24, 25, 26, 27, 0], [7, 0]]


def make_prompts(lengths, shared=0, seed=0):
    rng = np.random.default_rng(seed)
    beginning = rng.integers(1, 131, shared).tolist()
    return [beginning + rng.integers(1, 131, length).tolist() for length in lengths]


@torch.no_grad()
def naive(model, prompts, labels):
    """Score each prompt and label separately, without padding or batches."""
    scores = np.zeros((len(prompts), len(labels)))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            logits = model(torch.tensor([prompt + label])).logits[0].double()
            log_probabilities = logits.log_softmax(-1)
            for offset, token in enumerate(label):
                scores[row, column] += log_probabilities[len(prompt) + offset - 1, token].item()
    return scores


@pytest.mark.parametrize("shared", [0, 3, 20])
def test_scores_equal_the_naive_pass(any_model, shared):
    prompts = make_prompts([9, 1, 30, 14, 30, 2, 1], shared)
    expected = naive(any_model, prompts, LABELS)
    for batch_size in (1, 4, 16):
        actual = score_labels(any_model, prompts, LABELS, batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, rtol=2e-5)


def test_prompt_and_label_fill_the_context(any_model):
    prompts = make_prompts([64 - 6, 3])
    actual = score_labels(any_model, prompts, LABELS, batch_size=2)
    np.testing.assert_allclose(actual, naive(any_model, prompts, LABELS), rtol=2e-5)


def test_identical_prompts(any_model):
    prompts = make_prompts([0, 0, 0], shared=30)
    actual = score_labels(any_model, prompts, LABELS, batch_size=2)
    np.testing.assert_allclose(actual, naive(any_model, prompts, LABELS), rtol=2e-5)


def test_many_labels_are_scored_in_groups(model, monkeypatch):
    monkeypatch.setattr(likelihood, "_PACKED_LABEL_TOKENS", 7)
    prompts = make_prompts([9, 1, 30], shared=20)
    actual = score_labels(model, prompts, LABELS, batch_size=2)
    np.testing.assert_allclose(actual, naive(model, prompts, LABELS), rtol=2e-5)
    assert likelihood._group_labels([[1]] * 3 + [[1] * 9] + [[1] * 7, [1]]) == [
        [0, 1, 2],
        [3],
        [4],
        [5],
    ]


def test_single_token_labels(model):
    prompts = make_prompts([9, 1, 30])
    actual = score_labels(model, prompts, [[3], [4]], batch_size=3)
    np.testing.assert_allclose(actual, naive(model, prompts, [[3], [4]]), rtol=2e-5)


def test_batches_shrink_when_the_repeated_cache_is_too_large(model, monkeypatch):
    prompts = make_prompts([9, 1, 30, 4], shared=20)
    expected = score_labels(model, prompts, LABELS, batch_size=4)
    monkeypatch.setattr(likelihood, "_CACHE_BYTES", 1)
    np.testing.assert_allclose(
        score_labels(model, prompts, LABELS, batch_size=4), expected, rtol=1e-5
    )


def test_unlisted_architecture_is_scored_without_packing(any_model, monkeypatch):
    monkeypatch.setattr(likelihood, "_PACKABLE", set())
    assert not is_packable(any_model)
    prompts = make_prompts([9, 1, 30], shared=20)
    actual = score_labels(any_model, prompts, LABELS, batch_size=4)
    np.testing.assert_allclose(actual, naive(any_model, prompts, LABELS), rtol=2e-5)


def test_bfloat16_gives_the_same_with_and_without_packing(any_model):
    half = copy.deepcopy(any_model).bfloat16()
    prompts = make_prompts([9, 1, 30, 14], shared=20)
    packed = score_labels(half, prompts, LABELS, batch_size=4)
    plain = score_labels_one_by_one(half, prompts, LABELS, batch_size=4)
    np.testing.assert_allclose(packed, plain, rtol=0.05, atol=0.3)


def test_model_with_an_adapter():
    from peft import LoraConfig, get_peft_model
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=131, n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(GPTJForCausalLM(config), adapter).eval()
    assert is_packable(adapted)
    prompts = make_prompts([9, 1, 30], shared=20)
    actual = score_labels(adapted, prompts, LABELS, batch_size=4)
    np.testing.assert_allclose(actual, naive(adapted, prompts, LABELS), rtol=2e-5)


def test_empty_prompt_raises(model):
    with pytest.raises(ValueError, match="no tokens"):
        score_labels(model, [[1], []], LABELS, batch_size=2)


def test_nan_logits_raise(model):
    broken = copy.deepcopy(model)
    broken.lm_head.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="float32"):
        score_labels(broken, [[1, 2]], LABELS, batch_size=1)
