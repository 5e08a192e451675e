"""Batched answers keep the prompt order, equal unbatched answers and stay within memory limits."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from gptj8.model.generation import answers
from gptj8.model.generation.answers import confidence_of, write_answers
from gptj8.model.generation.batch import (
    Sampling,
    cache_bytes_per_token,
    generate,
)

TOKENS = 5


@pytest.fixture
def prompts(encoder):
    words = "the quick brown fox jumps over the lazy dog".split()
    return [encoder.encode(" ".join(words[: 1 + n * 4 % 9])) for n in range(9)]


@pytest.fixture
def generated(monkeypatch):
    """Prompt lengths of each generated batch."""
    batches = []

    def counted(model, prompts, *options):
        batches.append([len(prompt) for prompt in prompts])
        return generate(model, prompts, *options)

    monkeypatch.setattr(answers, "generate", counted)
    return batches


def write(model, encoder, prompts, batch_size=4):
    return [answer.text for answer in answered(model, encoder, prompts, batch_size)]


def answered(model, encoder, prompts, batch_size=4):
    samplings = [Sampling(TOKENS)] * len(prompts)
    return write_answers(
        model, prompts, encoder, samplings=samplings, batch_size=batch_size, description=None
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

    def limited(model, prompts, *options):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("simulated")
        return generate(model, prompts, *options)

    monkeypatch.setattr(answers, "generate", limited)
    assert write(model, encoder, prompts) == expected


def test_no_prompts_give_no_answers(model, encoder):
    assert write(model, encoder, []) == []


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_confidence_is_the_geometric_mean_of_token_probabilities(
    model, encoder, prompts, temperature
):
    """Compared with the likelihoods of transformers, in one pass over the whole answer."""
    ended = set()
    samplings = [Sampling(TOKENS, temperature, seed=n) for n in range(len(prompts))]
    answers = write_answers(
        model, prompts, encoder, samplings=samplings, batch_size=4, description=None
    )
    # The most likely token after some prompt ends it, so that one answer is empty.
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1, : encoder.vocab_size]
    ends = [int(logits.argmax())] if not temperature else [encoder.eos_id]
    for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
        for eos_ids, found in ((encoder.end_ids, answer.confidence), (ends, None)):
            (row,) = generate(model, [prompt], [sampling], encoder.vocab_size, eos_ids)
            if found is None:
                found = confidence_of(row)
            chosen = row.ids + [eos_ids[0]] * (row.finish_reason == "stop")
            ended.add(row.finish_reason)
            assert len(row.logprobs) == len(chosen)
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([prompt + chosen])).logits[0]
            probabilities = output[:, : encoder.vocab_size].double().softmax(1)
            places = range(len(prompt) - 1, len(prompt) - 1 + len(chosen))
            of_tokens = [float(probabilities[p, t]) for p, t in zip(places, chosen, strict=True)]
            assert found == pytest.approx(scipy.stats.gmean(of_tokens), rel=1e-4)
            assert 0 < found <= 1
    assert temperature or ended == {"stop", "length"}
