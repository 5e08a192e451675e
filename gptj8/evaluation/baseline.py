"""What a user could have instead: words counted and a linear classifier.

TF-IDF over single words and pairs, with sublinear term frequency, and a logistic regression, both
scikit-learn's, fitted on the training rows in seconds. A language model that does not beat it on
the same test rows has not earned its cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def predict_with_tfidf(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> np.ndarray:
    """Fit on the training rows and return a label for each test text: (test rows,) of str.

    Nothing is tuned on the way, so nothing of the test rows can leak into the fit. Training texts
    without a single word leave nothing to count: then each prediction is the commonest label.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    # Words of one letter count, which scikit-learn's own pattern drops.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")
    try:
        features = vectorizer.fit_transform(list(train_texts))
    except ValueError:  # empty vocabulary
        majority = DummyClassifier().fit(np.zeros((len(train_texts), 1)), list(train_labels))
        return majority.predict(np.zeros((len(test_texts), 1)))
    # The same optimum as the default solver's, in 1 s instead of 8 on 2,400 rows and 72,000 pairs.
    classifier = LogisticRegression(solver="newton-cg", max_iter=200)
    classifier.fit(features, list(train_labels))
    return classifier.predict(vectorizer.transform(list(test_texts)))
