"""Compute the entries of metrics.json from scores: `<system>/<metric>`, all floats.

There are three kinds of accuracy, because a single one can be misleading: `accuracy` of the most
likely label; `accuracy_normalized` of the label with the highest log-likelihood per token, which
removes the disadvantage of long labels (Brown et al., Language Models are Few-Shot Learners, 2020);
and `exact_match` of free-form answers.
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
    mean_per_token,
    perplexity_ratio,
)
from gptj8.evaluation.systems import ORIGINAL, TUNED
from gptj8.model.scoring.divergence import Divergence
from gptj8.model.scoring.perplexity import DocumentScores


def perplexity_metrics(
    scores: Mapping[str, DocumentScores], *, resamples: int, seed: int
) -> dict[str, float]:
    """Return `perplexity` of each system, and `perplexity_ratio` to the original model.

    The ratio has a 95 % confidence interval, `_low` and `_high`, from a paired bootstrap over
    documents.

    Args:
        scores: system -> scores of the documents.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.
    """
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


def divergence_metrics(
    divergences: Mapping[str, Divergence], *, resamples: int, seed: int
) -> dict[str, float]:
    """Return `kl_divergence` (nats per token) and `top1_agreement` (a share) of each system.

    Both compare with the original model, and have 95 % intervals from a bootstrap over documents.

    Args:
        divergences: system -> sums per document; documents without tokens are ignored.
        resamples, seed: settings of the bootstrap.
    """
    metrics: dict[str, float] = {}
    for system, found in divergences.items():
        for name, sums in (("kl_divergence", found.kl), ("top1_agreement", found.same)):
            mean = mean_per_token(
                sums, found.tokens, resamples=resamples, rng=np.random.default_rng(seed)
            )
            metrics |= _interval(f"{system}/{name}", mean)
    return metrics


def classification_metrics(
    labels: Sequence[str],
    actual: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """Return the classification metrics of each system.

    `accuracy` has a Wilson confidence interval. `macro_f1` is the macro-averaged F1. `not_a_label`,
    the share of predictions that are not a label, is present only if it is not 0. The tuned model
    is compared with every other system: `tuned/accuracy_minus_<system>` has a bootstrap confidence
    interval, and `tuned/p_value_against_<system>` is from McNemar's test.

    Args:
        labels: all labels.
        actual: (test rows,) true labels.
        predictions: system -> (test rows,) predictions; any value that is not a label counts as
            wrong.
        resamples, seed: settings of the paired bootstrap.
    """
    from sklearn.metrics import f1_score

    truth = np.array(actual, dtype=object)
    correct = {s: np.asarray(p, dtype=object) == truth for s, p in predictions.items()}
    metrics: dict[str, float] = {}
    known = set(labels)
    for system, predicted in predictions.items():
        metrics |= _interval(f"{system}/accuracy", accuracy_interval(correct[system]))
        # External systems can predict any text; this share explains a low accuracy.
        if unknown := np.mean([name not in known for name in predicted]):
            metrics[f"{system}/not_a_label"] = float(unknown)
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
        labels: all labels.
        label_tokens: number of tokens of each label, including its end token.
        actual: (test rows,) true labels.
        likelihoods: system -> (test rows, labels) log-likelihoods, in nats.
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
    """Return `exact_match` of each system with a Wilson confidence interval.

    Args:
        answers: correct answer of each row.
        generated: system -> generated texts for the first rows; surrounding white space is ignored.
    """
    metrics: dict[str, float] = {}
    for system, texts in generated.items():
        pairs = zip(texts, answers, strict=False)
        correct = np.array([text.strip() == answer.strip() for text, answer in pairs])
        metrics |= _interval(f"{system}/exact_match", accuracy_interval(correct))
    return metrics


def _interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
