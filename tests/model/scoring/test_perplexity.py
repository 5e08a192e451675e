"""Perplexity equals a float64 reference that is computed token by token."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from gptj8.evaluation.suite import Documents
from gptj8.model.scoring import perplexity
from gptj8.model.scoring.perplexity import (
    DocumentScores,
    context_length,
    plan_windows,
    score_documents,
    score_sequences,
    token_nll,
)
from gptj8.runtime.errors import UserError


def random_documents(lengths, vocabulary=131, seed=0):
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(1, vocabulary, length).tolist()] for length in lengths]


def reference_nll(model, ids, start, context, stride):
    """Return -log p of ids[start:] from the definition, with one float64 pass per token.

    The context of a token starts at the smallest multiple of the stride that is at most `context`
    tokens before it.
    """
    total = 0.0
    for position in range(start, len(ids)):
        begin = max(0, math.ceil((position - context) / stride)) * stride
        logits = model(torch.tensor([ids[begin:position]])).logits[0, -1].double()
        probabilities = logits.exp() / logits.exp().sum()
        total -= math.log(probabilities[ids[position]].item())
    return total


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (16, 8), (16, 5), (8, 8), (7, 1)])
def test_scores_equal_the_float64_reference(any_model, context, stride):
    documents = random_documents([1, 40, 3, 17, 9, 30])
    starts = [1, 1, 2, 1, 4, 30]
    with torch.no_grad():
        double = copy.deepcopy(any_model).double()
        expected = [
            reference_nll(double, ids, start, context, stride)
            for ids, start in zip(documents, starts, strict=True)
        ]
    scores = score_documents(
        any_model, documents, starts, batch_size=4, context=context, stride=stride
    )
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-5)
    tokens = sum(len(ids) - start for ids, start in zip(documents, starts, strict=True))
    assert scores.tokens.sum() == tokens
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / tokens), rel=1e-5)


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 2), (4, 3), (8, 8), (8, 1)])
def test_windows_score_each_token_once_with_enough_context(length, context, stride):
    scored = []
    for begin, end, first in plan_windows(length, context, stride):
        assert begin < first < end <= length
        assert end - begin <= context + 1
        assert begin == 0 or first - begin >= context - stride + 1
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_stride_outside_the_context_raises(stride):
    with pytest.raises(ValueError, match="stride"):
        plan_windows(20, 8, stride)


def test_scores_do_not_depend_on_batches_and_chunks(model, monkeypatch):
    sequences = random_documents([5, 1, 30, 12, 30, 2, 63])
    starts = [1] * len(sequences)
    one = score_sequences(model, sequences, starts, batch_size=1)
    np.testing.assert_allclose(
        score_sequences(model, sequences, starts, batch_size=16), one, rtol=1e-5
    )
    monkeypatch.setitem(perplexity._CHUNK_LOGITS, "cpu", 131 * 3)
    np.testing.assert_allclose(
        score_sequences(model, sequences, starts, batch_size=16), one, rtol=1e-5
    )


def test_model_that_returns_all_logits_gives_the_same_scores(model):
    class AllLogits(torch.nn.Module):
        device, config = model.device, model.config

        def forward(self, logits_to_keep, **inputs):
            return model(**inputs)

    sequences = random_documents([5, 1, 30])
    expected = score_sequences(model, sequences, [1, 1, 7], batch_size=2)
    actual = score_sequences(AllLogits(), sequences, [1, 1, 7], batch_size=2)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_perplexity_is_a_mean_over_tokens():
    scores = DocumentScores(np.array([8.0, 1.0]), np.array([2, 1]))
    assert scores.perplexity == pytest.approx(math.exp(3))


def test_16_bit_logits_are_reduced_in_float32():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(50)
    expected = -logits.double().log_softmax(1)[torch.arange(50), targets]
    actual = token_nll(logits, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_nan_logits_raise(model):
    broken = copy.deepcopy(model)
    broken.lm_head.bias.data[3] = float("nan")
    with pytest.raises(UserError, match=r"base: perplexity.*float32"):
        score_documents(broken, [[0, 1, 2]], [1], batch_size=1, description="base: perplexity")


def test_texts_start_after_end_of_text(encoder):
    texts = ["the fox", "", "<|endoftext|>dog"]
    documents = Documents.of_texts(texts, encoder)
    assert documents.ids == [[0, *encoder.encode(text)] for text in texts]
    assert documents.starts == [1, 1, 1]
    assert 0 not in documents.ids[2][1:]  # text is never parsed as a special token


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"max_position_embeddings": 512}, 512), ({"n_positions": 128}, 128), ({}, 2048)],
)
def test_context_length(fields, expected):
    assert context_length(type("Config", (), fields)) == expected


def test_context_length_of_gptj(model):
    assert context_length(model.config) == 64
