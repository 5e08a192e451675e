"""The baseline equals scikit-learn's default solver and handles texts without words."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from gptj8.evaluation.baseline import predict_with_tfidf


def make_rows(count, seed):
    rng = np.random.default_rng(seed)
    words = np.array([f"word{number}" for number in range(60)])
    labels = [f"class{number % 3}" for number in range(count)]
    texts = []
    for label in labels:
        own = int(label[-1]) * 20 + rng.integers(20, size=4)
        texts.append(" ".join([*words[own], *rng.choice(words, 12)]))
    return texts, labels


def test_predictions_equal_the_default_solver():
    train, labels = make_rows(300, 0)
    test, actual = make_rows(150, 1)
    predicted, sure = predict_with_tfidf(train, labels, test)
    reference = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(tol=1e-8)
    ).fit(train, labels)
    assert (predicted == reference.predict(test)).mean() > 0.98
    assert (predicted == actual).mean() > 0.7
    assert sure == pytest.approx(reference.predict_proba(test).max(axis=1), abs=0.01)


def test_one_letter_words_are_used():
    predicted, _ = predict_with_tfidf(["a", "b", "a", "b"], ["x", "y", "x", "y"], ["b", "a"])
    assert predicted.tolist() == ["y", "x"]


def test_most_frequent_label_without_words():
    predicted, sure = predict_with_tfidf(["!", "?", "."], ["x", "y", "y"], ["!", "?"])
    assert predicted.tolist() == ["y", "y"]
    assert sure == pytest.approx([2 / 3, 2 / 3])
