"""Baseline without a language model: TF-IDF features and a linear classifier.

TF-IDF over words and word pairs with sublinear term frequency, and a logistic regression, both from
scikit-learn and fitted on the training rows in seconds. A language model is worth its cost only if
it is better than this baseline on the same test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def predict_with_tfidf(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Fit on the training rows and predict a label for each test text.

    There is no hyperparameter tuning, so the test rows cannot leak into the fit. If the training
    texts contain no words, the most frequent label is predicted for every row, with its share of
    the training rows as the probability.

    Returns:
        (test rows,) of str, the labels, and (test rows,) float64, their probabilities.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    # Includes words of one letter, which scikit-learn's default pattern drops.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")
    try:
        features = vectorizer.fit_transform(list(train_texts))
    except ValueError:  # empty vocabulary
        majority = DummyClassifier().fit(np.zeros((len(train_texts), 1)), list(train_labels))
        return _predict(majority, np.zeros((len(test_texts), 1)))
    # Same optimum as the default solver, in 1 s instead of 8 s on 2,400 rows and 72,000 features.
    classifier = LogisticRegression(solver="newton-cg", max_iter=200)
    classifier.fit(features, list(train_labels))
    return _predict(classifier, vectorizer.transform(list(test_texts)))


def _predict(classifier: Any, features: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities = classifier.predict_proba(features)
    return classifier.classes_[probabilities.argmax(1)], probabilities.max(1)
