"""Many answers at once: in the order of the prompts, as alone, within the memory there is."""

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
    """The batches that a model was asked for, as lengths of their prompts."""
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


def test_answers_are_in_the_order_of_their_prompts_and_as_alone(model, encoder, prompts, generated):
    written = write(model, encoder, prompts)
    assert sorted(map(len, generated)) == [1, 4, 4]
    assert written == [write(model, encoder, [prompt])[0] for prompt in prompts]
    assert len(set(written)) > 1


def test_keys_and_values_stay_within_their_memory(model, encoder, prompts, generated, monkeypatch):
    whole = write(model, encoder, prompts)
    longest = max(map(len, prompts)) + TOKENS
    monkeypatch.setattr(answers, "_CACHE_BYTES", 2 * longest * cache_bytes_per_token(model))
    generated.clear()
    assert write(model, encoder, prompts, batch_size=9) == whole
    assert len(generated[0]) == 2
    assert all(len(batch) * (max(batch) + TOKENS) <= 2 * longest for batch in generated)


def test_a_batch_that_does_not_fit_is_halved(model, encoder, prompts, monkeypatch):
    whole = write(model, encoder, prompts)

    def generate(model, prompts, **options):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("simulated")
        return generate_greedily(model, prompts, **options)

    monkeypatch.setattr(answers, "generate_greedily", generate)
    assert write(model, encoder, prompts) == whole


def test_no_prompts_are_no_answers(model, encoder):
    assert write(model, encoder, []) == []
