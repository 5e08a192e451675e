"""Batched answers keep the prompt order, equal unbatched answers and stay within memory limits."""

from __future__ import annotations

import pytest
import torch

from gptj8.model.generation import answers
from gptj8.model.generation.answers import write_answers
from gptj8.model.generation.batch import cache_bytes_per_token, generate_greedily

TOKENS = 5


@pytest.fixture
def prompts(encoder):
    words = "the quick brown fox jumps over the lazy dog".split()
    return [encoder.encode(" ".join(words[: 1 + n * 4 % 9])) for n in range(9)]


@pytest.fixture
def generated(monkeypatch):
    """Prompt lengths of each generated batch."""
    batches = []

    def generate(model, prompts, **options):
        batches.append([len(prompt) for prompt in prompts])
        return generate_greedily(model, prompts, **options)

    monkeypatch.setattr(answers, "generate_greedily", generate)
    return batches


def write(model, encoder, prompts, batch_size=4):
    return write_answers(
        model, prompts, encoder, max_new_tokens=TOKENS, batch_size=batch_size, description=None
    )


def test_batched_answers_equal_single_answers_in_order(model, encoder, prompts, generated):
    written = write(model, encoder, prompts)
    assert sorted(map(len, generated)) == [1, 4, 4]
    assert written == [write(model, encoder, [prompt])[0] for prompt in prompts]
    assert len(set(written)) > 1


def test_cache_memory_is_limited(model, encoder, prompts, generated, monkeypatch):
    expected = write(model, encoder, prompts)
    longest = max(map(len, prompts)) + TOKENS
    monkeypatch.setattr(answers, "_CACHE_BYTES", 2 * longest * cache_bytes_per_token(model))
    generated.clear()
    assert write(model, encoder, prompts, batch_size=9) == expected
    assert len(generated[0]) == 2
    assert all(len(batch) * (max(batch) + TOKENS) <= 2 * longest for batch in generated)


def test_batch_is_halved_when_out_of_memory(model, encoder, prompts, monkeypatch):
    expected = write(model, encoder, prompts)

    def generate(model, prompts, **options):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("simulated")
        return generate_greedily(model, prompts, **options)

    monkeypatch.setattr(answers, "generate_greedily", generate)
    assert write(model, encoder, prompts) == expected


def test_no_prompts_give_no_answers(model, encoder):
    assert write(model, encoder, []) == []
