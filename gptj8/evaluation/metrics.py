"""From scores to the numbers of metrics.json: `<system>/<metric>`, every one a float.

Accuracy comes in three kinds, because each of them alone has flattered somebody: of the likeliest
label (`accuracy`), of the label that is likeliest a token, which takes away what a long label has
against it (`accuracy_normalized`; Brown et al., Language Models are Few-Shot Learners, 2020), and
of what the model writes when nothing holds it to the labels (`exact_match`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gptj8.evaluation.calibration import expected_calibration_error, reliability_curves
from gptj8.evaluation.statistics import (
    Estimate,
    accuracy_difference,
    accuracy_interval,
    mcnemar,
    perplexity_ratio,
)
from gptj8.evaluation.systems import ORIGINAL, TUNED
from gptj8.model.scoring.perplexity import DocumentScores


def perplexity_metrics(
    scores: Mapping[str, DocumentScores], *, resamples: int, seed: int
) -> dict[str, float]:
    """Return `perplexity` of each system and, of those beside the original, `perplexity_ratio` to
    it, `_low` and `_high` (95 %, paired bootstrap by document)."""
    metrics = {f"{system}/perplexity": score.perplexity for system, score in scores.items()}
    original = scores.get(ORIGINAL)
    if original is None:
        return metrics
    for system, score in scores.items():
        if system == ORIGINAL:
            continue
        ratio = perplexity_ratio(
            score.nll,
            original.nll,
            original.tokens,
            resamples=resamples,
            rng=np.random.default_rng(seed),
        )
        metrics |= _interval(f"{system}/perplexity_ratio", ratio)
    return metrics


def classification_metrics(
    labels: Sequence[str],
    actual: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """Return `accuracy` with its interval (Wilson) and `macro_f1` of each system, `not_a_label` (a
    share of the rows) where another system predicts what is none, and by how much
    the tuned one differs from each other: `tuned/accuracy_minus_<system>` with its interval and
    `tuned/p_value_against_<system>` (McNemar).

    Args:
        labels: all of them.
        actual: (test rows,) true labels.
        predictions: system -> (test rows,) labels, or anything else, which is wrong.
        resamples, seed: of the paired bootstrap.
    """
    from sklearn.metrics import f1_score

    truth = np.array(actual, dtype=object)
    correct = {s: np.asarray(p, dtype=object) == truth for s, p in predictions.items()}
    metrics: dict[str, float] = {}
    known = set(labels)
    for system, predicted in predictions.items():
        metrics |= _interval(f"{system}/accuracy", accuracy_interval(correct[system]))
        # Of systems that are free in what they say: a share that explains a low accuracy.
        if strangers := np.mean([name not in known for name in predicted]):
            metrics[f"{system}/not_a_label"] = float(strangers)
        metrics[f"{system}/macro_f1"] = float(
            f1_score(
                list(actual), list(predicted), labels=list(labels), average="macro", zero_division=0
            )
        )
    for system in correct if TUNED in correct else ():
        if system == TUNED:
            continue
        pair = correct[TUNED], correct[system]
        rng = np.random.default_rng(seed)
        difference = accuracy_difference(*pair, resamples=resamples, rng=rng)
        metrics |= _interval(f"{TUNED}/accuracy_minus_{system}", difference)
        metrics[f"{TUNED}/p_value_against_{system}"] = mcnemar(*pair).p_value
    return metrics


def likelihood_metrics(
    labels: Sequence[str],
    label_tokens: Sequence[int],
    actual: Sequence[str],
    likelihoods: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Return `accuracy_normalized` and `ece` (expected calibration error) of each system.

    Args:
        labels: all of them.
        label_tokens: how many tokens each has, its end included.
        actual: (test rows,) true labels.
        likelihoods: system -> (test rows, labels), in nats.
    """
    names, truth = np.array(labels, dtype=object), np.array(actual, dtype=object)
    metrics = {
        f"{system}/ece": expected_calibration_error(bins)
        for system, bins in reliability_curves(labels, actual, likelihoods).items()
    }
    for system, scores in likelihoods.items():
        predicted = names[(scores / np.array(label_tokens)).argmax(1)]
        metrics[f"{system}/accuracy_normalized"] = float((predicted == truth).mean())
    return metrics


def generation_metrics(
    answers: Sequence[str], generated: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return `exact_match` of each system with its interval (Wilson).

    Args:
        answers: of each row, what is right.
        generated: system -> what it wrote for the first rows; white space around it is no error.
    """
    metrics: dict[str, float] = {}
    for system, texts in generated.items():
        pairs = zip(texts, answers, strict=False)
        correct = np.array([text.strip() == answer.strip() for text, answer in pairs])
        metrics |= _interval(f"{system}/exact_match", accuracy_interval(correct))
    return metrics


def _interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
