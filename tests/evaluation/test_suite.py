"""Systems side by side: metrics equal to scikit-learn's and to arithmetic by hand."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from gptj8.evaluation.suite import Documents, compare_on
from gptj8.prompts import PromptEncoder

LABELS = ("dog", "fox", "sql", "sqlalchemy")


@pytest.fixture
def rows():
    texts = [f"the {'quick ' * number}brown fox {number}" for number in range(8)]
    return pd.DataFrame({"text": texts, "label": [LABELS[number % 3] for number in range(8)]})


def test_metrics_of_a_classification(model, encoder, rows):
    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 64)
    documents = Documents.of_texts(rows["text"], encoder)
    comparison = compare_on(rows, LABELS, prompts, documents, batch_size=4)
    comparison.measure("base", model)
    comparison.measure("quantized", model)
    metrics = comparison.metrics(rows["label"], resamples=100, seed=0)

    predicted = comparison.predictions["base"]
    assert predicted.tolist() == [LABELS[i] for i in comparison.likelihoods["base"].argmax(1)]
    assert metrics["base/accuracy"] == accuracy_score(rows["label"], predicted)
    assert metrics["base/macro_f1"] == f1_score(
        rows["label"], predicted, labels=list(LABELS), average="macro", zero_division=0
    )
    scores = comparison.scores["base"]
    expected = np.exp(scores.nll.sum() / scores.tokens.sum())
    assert metrics["base/perplexity"] == pytest.approx(expected)
    for end in ("", "_low", "_high"):
        assert metrics[f"quantized/perplexity_ratio{end}"] == 1
    assert metrics["tokens_per_second"] > 0
    assert all(type(value) is float for value in metrics.values())


def test_without_labels_only_perplexity(model, encoder, rows):
    prompts = PromptEncoder(encoder, "{text}", 64)
    documents = Documents.of_texts(rows["text"], encoder)
    comparison = compare_on(rows, (), prompts, documents, batch_size=4)
    comparison.measure("tuned", model)
    metrics = comparison.metrics([], resamples=100, seed=0)
    assert set(metrics) == {"tuned/perplexity", "tokens_per_second"}


def test_only_completions_are_scored(encoder):
    prompts = PromptEncoder(encoder, "{prompt}", 64)
    documents = Documents.of_completions([("the fox", "sql"), ("", "dog")], prompts)
    scored = [ids[start:] for ids, start in zip(documents.ids, documents.starts, strict=True)]
    assert scored == [prompts.completion_ids("sql"), prompts.completion_ids("dog")]
    assert documents.starts == [len(encoder.encode("the fox")), 1]


def test_a_measured_model_is_freed(encoder, rows):
    """The original and the 8-bit model together may not fit where each of them does."""
    from transformers import GPTJConfig, GPTJForCausalLM

    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 64)
    documents = Documents.of_texts(rows["text"], encoder)
    comparison = compare_on(rows, LABELS, prompts, documents, batch_size=4)
    model = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=131, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    alive = weakref.ref(model)
    gc.disable()
    try:
        comparison.measure("base", model.eval())
        del model
        assert alive() is None
    finally:
        gc.enable()
