"""All labels in one pass, against a plain forward pass for each pair of prompt and label."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gptj8.model.scoring import likelihood
from gptj8.model.scoring.likelihood import is_packable, score_labels, score_labels_one_by_one
from gptj8.runtime.errors import UserError

# Labels of one token, of several, one that begins another, and two that are the same.
LABELS = [[5], [7, 0], [7, 9, 11, 0], [23, 24, 25, 26, 27, 0], [7, 0]]


def make_prompts(lengths, shared=0, seed=0):
    rng = np.random.default_rng(seed)
    beginning = rng.integers(1, 131, shared).tolist()
    return [beginning + rng.integers(1, 131, length).tolist() for length in lengths]


@torch.no_grad()
def naive(model, prompts, labels):
    """Without padding, without batches: the model reads one prompt and one label."""
    scores = np.zeros((len(prompts), len(labels)))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            logits = model(torch.tensor([prompt + label])).logits[0].double()
            log_probabilities = logits.log_softmax(-1)
            for offset, token in enumerate(label):
                scores[row, column] += log_probabilities[len(prompt) + offset - 1, token].item()
    return scores


@pytest.mark.parametrize("shared", [0, 3, 20])
def test_equals_the_naive_pass(any_model, shared):
    prompts = make_prompts([9, 1, 30, 14, 30, 2, 1], shared)
    expected = naive(any_model, prompts, LABELS)
    for batch_size in (1, 4, 16):
        actual = score_labels(any_model, prompts, LABELS, batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, rtol=2e-5)


def test_prompts_up_to_the_last_position(any_model):
    prompts = make_prompts([64 - 6, 3])
    actual = score_labels(any_model, prompts, LABELS, batch_size=2)
    np.testing.assert_allclose(actual, naive(any_model, prompts, LABELS), rtol=2e-5)


def test_one_prompt_repeated(any_model):
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


def test_labels_of_one_token(model):
    prompts = make_prompts([9, 1, 30])
    actual = score_labels(model, prompts, [[3], [4]], batch_size=3)
    np.testing.assert_allclose(actual, naive(model, prompts, [[3], [4]]), rtol=2e-5)


def test_the_shared_cache_is_repeated_for_few_rows_when_memory_is_short(model, monkeypatch):
    prompts = make_prompts([9, 1, 30, 4], shared=20)
    expected = score_labels(model, prompts, LABELS, batch_size=4)
    monkeypatch.setattr(likelihood, "_CACHE_BYTES", 1)
    np.testing.assert_allclose(
        score_labels(model, prompts, LABELS, batch_size=4), expected, rtol=1e-5
    )


def test_an_architecture_that_was_not_tested_is_scored_the_plain_way(any_model, monkeypatch):
    monkeypatch.setattr(likelihood, "_PACKABLE", set())
    assert not is_packable(any_model)
    prompts = make_prompts([9, 1, 30], shared=20)
    actual = score_labels(any_model, prompts, LABELS, batch_size=4)
    np.testing.assert_allclose(actual, naive(any_model, prompts, LABELS), rtol=2e-5)


def test_bfloat16_gives_the_same_either_way(any_model):
    half = copy.deepcopy(any_model).bfloat16()
    prompts = make_prompts([9, 1, 30, 14], shared=20)
    packed = score_labels(half, prompts, LABELS, batch_size=4)
    plain = score_labels_one_by_one(half, prompts, LABELS, batch_size=4)
    np.testing.assert_allclose(packed, plain, rtol=0.05, atol=0.3)


def test_with_an_adapter():
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


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="no token"):
        score_labels(model, [[1], []], LABELS, batch_size=2)


def test_not_a_number_is_reported(model):
    broken = copy.deepcopy(model)
    broken.lm_head.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="float32"):
        score_labels(broken, [[1, 2]], LABELS, batch_size=1)
