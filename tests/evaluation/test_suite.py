"""Metrics of the compared systems equal scikit-learn and manual calculations."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.evaluation.suite import Comparison, Documents, Questions, held_out_documents

LABELS = ("dog", "fox", "sql", "sqlalchemy")


@pytest.fixture
def rows():
    texts = [f"the {'quick ' * number}brown fox {number}" for number in range(8)]
    return pd.DataFrame({"text": texts, "label": [LABELS[number % 3] for number in range(8)]})


def compare_on(rows, labels, prompts, task="classification", **generated):
    _, documents = held_out_documents("text", rows, prompts)
    questions = Questions.of_rows(task, rows, labels, prompts, max_new_tokens=6, **generated)
    return Comparison(documents, questions, batch_size=4)


def test_metrics_of_a_classification(model, encoder, rows):
    comparison = compare_on(rows, LABELS, PromptEncoder(encoder, "{text}\n\nLabel:", 64))
    with comparison.costing("base"):
        comparison.measure("base", model)
    comparison.measure("quantized", model)
    comparison.measure("tuned", model)
    metrics = comparison.metrics(resamples=100, seed=0)

    predicted, likelihoods = comparison.predictions["base"], comparison.likelihoods["base"]
    assert predicted.tolist() == [LABELS[i] for i in likelihoods.argmax(1)]
    assert metrics["base/accuracy"] == accuracy_score(rows["label"], predicted)
    assert metrics["base/macro_f1"] == f1_score(
        rows["label"], predicted, labels=list(LABELS), average="macro", zero_division=0
    )
    low, high = proportion_interval(sum(rows["label"] == predicted), len(rows))
    assert metrics["base/accuracy_low"] == pytest.approx(low)
    assert metrics["base/accuracy_high"] == pytest.approx(high)
    tokens = [len(comparison.questions.encoder.encode(f" {label}")) + 1 for label in LABELS]
    normalized = [LABELS[i] for i in (likelihoods / tokens).argmax(1)]
    assert metrics["base/accuracy_normalized"] == accuracy_score(rows["label"], normalized)
    assert 0 <= metrics["base/ece"] <= 1
    scores = comparison.scores["base"]
    expected = np.exp(scores.nll.sum() / scores.tokens.sum())
    assert metrics["base/perplexity"] == pytest.approx(expected)
    for end in ("", "_low", "_high"):
        assert metrics[f"quantized/perplexity_ratio{end}"] == 1
    assert metrics["tuned/accuracy_minus_base"] == 0
    assert metrics["tuned/p_value_against_base"] == 1
    for cost in ("seconds", "tokens_per_second", "peak_memory_gib"):
        assert metrics[f"base/{cost}"] > 0
    assert metrics["tokens_per_second"] > 0
    assert all(type(value) is float for value in metrics.values())


def proportion_interval(right, rows, z=1.959963984540054):
    """Return Wilson's interval from the textbook formula."""
    share = right / rows
    middle = share + z * z / (2 * rows)
    half = z * np.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return (middle - half) / (1 + z * z / rows), (middle + half) / (1 + z * z / rows)


def test_answers_equal_transformers_generate(model, encoder, rows):
    comparison = compare_on(
        rows, LABELS, PromptEncoder(encoder, "{text}\n\nLabel:", 64), max_generated_rows=5
    )
    comparison.measure("base", model)
    questions = comparison.questions
    assert questions.max_new_tokens == max(len(encoder.encode(f" {x}")) + 1 for x in LABELS)
    expected = []
    for prompt in questions.prompts[:5]:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=questions.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(encoder.vocab_size, model.config.vocab_size)) or None,
        )
        expected.append(encoder.decode(output[0, len(prompt) :].tolist()).strip())
    assert comparison.generated["base"] == expected
    right = [text == label for text, label in zip(expected, rows["label"][:5], strict=True)]
    assert comparison.metrics(100, 0)["base/exact_match"] == np.mean(right)


def test_exact_match_of_completions(model, encoder):
    rows = pd.DataFrame({"prompt": ["the fox", "a dog"], "completion": ["", ""], "text": "x"})
    prompts = PromptEncoder(encoder, "{prompt}", 64)
    unlabeled = compare_on(rows, (), prompts, "completion")
    unlabeled.measure("tuned", model)
    rows["completion"] = [unlabeled.generated["tuned"][0], "something else"]
    comparison = compare_on(rows, (), prompts, "completion")
    comparison.measure("tuned", model)
    metrics = comparison.metrics(100, 0)
    assert metrics["tuned/exact_match"] == 0.5
    assert "tuned/accuracy" not in metrics


def test_task_without_labels_has_only_perplexity(model, encoder, rows):
    comparison = compare_on(rows, (), PromptEncoder(encoder, "{text}", 64), "text")
    comparison.measure("tuned", model)
    metrics = comparison.metrics(resamples=100, seed=0)
    assert set(metrics) == {
        "tuned/perplexity",
        "tuned/tokens_per_second",
        "tokens_per_second",
    }


def test_only_completions_are_scored(encoder):
    prompts = PromptEncoder(encoder, "{prompt}", 64)
    documents = Documents.of_completions([("the fox", "sql"), ("", "dog")], prompts)
    scored = [ids[start:] for ids, start in zip(documents.ids, documents.starts, strict=True)]
    assert scored == [prompts.completion_ids("sql"), prompts.completion_ids("dog")]
    assert documents.starts == [len(encoder.encode("the fox")), 1]


def test_measured_model_is_freed(encoder, rows):
    """Memory may be large enough for one of the two models, but not for both."""
    from transformers import GPTJConfig, GPTJForCausalLM

    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 64)
    comparison = compare_on(rows, LABELS, prompts)
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
