"""KL divergence and agreement equal a float64 reference, computed token by token."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptj8.evaluation.metrics import divergence_metrics
from gptj8.model.scoring import divergence
from gptj8.model.scoring.divergence import Divergence, NextTokens, compared_documents
from tests.model.scoring.test_perplexity import random_documents

LENGTHS = [5, 40, 3, 17, 9, 30]
STARTS = [1, 2, 1, 4, 1, 20]


def changed(model, amount, seed=1):
    """Return a copy of a model with noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += amount * torch.randn(weight.shape, generator=generator)
    return other


@torch.no_grad()
def reference(model, other, document, start):
    """Return the sums of KL and of equal choices from the definition, in float64."""
    model, other = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    kl = same = 0.0
    for position in range(start, len(document)):
        ids = torch.tensor([document[:position]])
        p, q = (m(ids).logits[0, -1].softmax(0) for m in (model, other))
        kl += float((p * (p.log() - q.log())).sum())
        same += float(p.argmax() == q.argmax())
    return kl, same


@pytest.mark.parametrize("chunk", [1 << 20, 200], ids=["one-chunk", "many-chunks"])
def test_sums_equal_the_float64_reference(any_model, monkeypatch, chunk):
    monkeypatch.setitem(divergence.chunk_rows.__globals__["_CHUNK_LOGITS"], "cpu", chunk)
    documents = random_documents(LENGTHS)
    other = changed(any_model, 0.02)
    found = NextTokens(any_model, documents, STARTS, batch_size=3).compare(other)
    for number, (document, start) in enumerate(zip(documents, STARTS, strict=True)):
        kl, same = reference(any_model, other, document, start)
        assert found.kl[number] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert found.same[number] == same
        assert found.tokens[number] == len(document) - start
    assert found.kl.sum() > 1e-3 and found.same.sum() < found.tokens.sum()


def test_a_model_does_not_diverge_from_itself(model):
    documents = random_documents(LENGTHS)
    stored = NextTokens(model, documents, STARTS, batch_size=2)
    found = stored.compare(model)
    assert np.abs(found.kl).max() < 1e-6
    assert (found.same == found.tokens).all()
    # More noise, more divergence; the stored distributions can be compared again.
    sums = [stored.compare(changed(model, amount)).kl.sum() for amount in (0.001, 0.01, 0.1)]
    assert 0 < 10 * sums[0] < sums[1] < sums[2] / 10


def test_the_temporary_file_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = NextTokens(model, random_documents(LENGTHS), STARTS, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    del stored
    assert list(tmp_path.iterdir()) == []


def test_documents_are_limited_in_tokens_and_memory(monkeypatch):
    config = SimpleNamespace(vocab_size=1000, max_position_embeddings=20)
    documents = [list(range(50)), list(range(5)), list(range(3)), list(range(8))]
    starts = [2, 5, 1, 1]
    chosen, firsts = compared_documents(documents, starts, config)
    # Cut to the context; a document without scored tokens is left out.
    assert [len(ids) for ids in chosen] == [21, 3, 8] and firsts == [2, 1, 1]
    monkeypatch.setattr(divergence, "_TOKENS", 22)
    assert [len(ids) for ids in compared_documents(documents, starts, config)[0]] == [21, 3, 2]
    monkeypatch.setattr(divergence, "_BYTES", 4 * 1000 * 19)
    assert [len(ids) for ids in compared_documents(documents, starts, config)[0]] == [21]


def test_metrics_are_means_per_token_with_intervals():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 30, 400)
    kl = generator.gamma(2.0, 0.001, 400) * tokens
    metrics = divergence_metrics(
        {"quantized": Divergence(kl, tokens * 0.9, tokens)}, resamples=500, seed=0
    )
    mean = kl.sum() / tokens.sum()
    assert metrics["quantized/kl_divergence"] == pytest.approx(mean)
    assert metrics["quantized/top1_agreement"] == pytest.approx(0.9)
    low, high = (metrics[f"quantized/kl_divergence_{end}"] for end in ("low", "high"))
    # The interval of a ratio estimator, from its linearization.
    deviation = np.std(kl - mean * tokens) * np.sqrt(400) / tokens.sum()
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert low < mean < high
