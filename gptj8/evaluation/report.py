"""Write the files of the evaluation report: CSV tables and plots.

The same scores give byte-identical files: rows keep the order of the dataset, and numbers have six
decimals, p-values six significant digits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gptj8.evaluation.calibration import ReliabilityBin, reliability_curves
from gptj8.evaluation.plots import plot_confusion, plot_reliability
from gptj8.evaluation.statistics import accuracy_difference, mcnemar
from gptj8.evaluation.systems import CONFIDENCE, ORIGINAL, TUNED, WROTE
from gptj8.model.scoring.perplexity import DocumentScores
from gptj8.runtime.tables import write_csv

_TEXT_START = 120  # characters
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_PLOTTED = (TUNED, ORIGINAL)


def write_reports(
    directory: Path,
    test: pd.DataFrame,
    documents: pd.DataFrame,
    labels: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    scores: Mapping[str, DocumentScores],
    generated: Mapping[str, Sequence[str]] | None = None,
    confidences: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write predictions.csv, perplexity.csv, confusion_matrix.csv and confusion_matrix.png.

    All four files are always written, because DVC requires every declared output. Without labels,
    the tables have no rows and the plot contains a note.

    Args:
        directory: output directory; created if it does not exist.
        test: the test split, with `file` and `row`, and with `text` and `label` for classification.
        documents: `file` and `row` of each document that perplexity was measured on.
        labels: all labels, in the order of the plot axes; empty if nothing was classified.
        predictions: system -> (test rows,) labels; the confusion matrix is for `tuned`.
        scores: system -> scores of the documents; all systems have the same tokens.
        generated: system -> generated texts for the first rows.
        confidences: system -> probability of each predicted label, and `<system>_wrote` ->
            confidence of each generated text, for the systems that have them.
    """
    actual = list(test["label"]) if labels else []
    predicted = list(predictions[TUNED]) if labels else []
    confusion = zip(actual, predicted, strict=True)
    write_table(directory / "confusion_matrix.csv", ["actual", "predicted"], confusion)
    answered = dict(predictions) | {f"{s}{WROTE}": texts for s, texts in (generated or {}).items()}
    _write_predictions(directory / "predictions.csv", test, answered, confidences or {})
    _write_perplexity(directory / "perplexity.csv", documents, scores)
    plot_confusion(directory / "confusion_matrix.png", labels, actual, predicted)


def write_classification_reports(
    directory: Path,
    labels: Sequence[str],
    actual: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    likelihoods: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
) -> None:
    """Write per_class.csv, comparisons.csv, reliability.csv and reliability.png.

    All four files are always written. Without labels, the tables have no rows and the plot contains
    a note.

    Args:
        directory: output directory; created if it does not exist.
        labels: all labels; empty if nothing was classified.
        actual: (test rows,) true labels, each one of `labels`.
        predictions: system -> (test rows,) predictions; values that are not in `labels` are wrong.
        likelihoods: system -> (test rows, labels) log-likelihoods, for the systems that have them;
            the plot shows `tuned` and `base`.
        resamples: number of bootstrap samples for the comparison of two systems.
        seed: seed of the bootstrap.
    """
    if not labels:
        predictions, likelihoods = {}, {}
    write_per_class(directory / "per_class.csv", labels, actual, predictions)
    write_comparisons(directory / "comparisons.csv", actual, predictions, resamples, seed)
    curves = reliability_curves(labels, actual, likelihoods)
    write_reliability(directory / "reliability.csv", curves)
    plotted = {system: curves[system] for system in _PLOTTED if system in curves}
    plot_reliability(directory / "reliability.png", plotted)


def write_per_class(
    path: Path, labels: Sequence[str], actual: Sequence[str], predictions: Mapping[str, np.ndarray]
) -> None:
    """Write precision, recall, F1 and the number of actual rows per system and label.

    Precision is 0 for labels that are never predicted, recall is 0 for labels without rows, and F1
    is 0 in both cases.
    """
    from sklearn.metrics import precision_recall_fscore_support

    rows: list[tuple[Any, ...]] = []
    for system, predicted in predictions.items():
        columns = precision_recall_fscore_support(
            list(actual), list(predicted), labels=list(labels), zero_division=0
        )
        rows += [(system, *row) for row in zip(labels, *columns, strict=True)]
    write_table(path, ["system", "label", "precision", "recall", "f1", "support"], rows)


def write_comparisons(
    path: Path,
    actual: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    resamples: int,
    seed: int,
) -> None:
    """Write the difference of accuracies, first - second, and its significance for each pair.

    `low` and `high` are the 95 % confidence interval from `accuracy_difference`, and `p_value` is
    from `mcnemar`, with six significant digits: six decimals of a small number are all 0. Every
    pair uses the same seed, so adding a system does not change the intervals of other pairs.
    """
    truth = np.array(actual, dtype=object)
    correct = {s: (np.asarray(p, dtype=object) == truth) for s, p in predictions.items()}
    rows = []
    for first, second in itertools.combinations(correct, 2):
        pair = correct[first], correct[second]
        rng = np.random.default_rng(seed)
        difference = accuracy_difference(*pair, resamples=resamples, rng=rng)
        test = mcnemar(*pair)
        accuracies = [float(part.mean()) for part in pair]
        interval = difference.value, difference.low, difference.high
        counts = test.only_first, test.only_second
        rows.append((first, second, *accuracies, *interval, *counts, f"{test.p_value:.6g}"))
    header = ["first", "second", "accuracy_first", "accuracy_second", "difference", "low", "high"]
    write_table(path, [*header, "only_first", "only_second", "p_value"], rows)


def write_reliability(path: Path, curves: Mapping[str, Sequence[ReliabilityBin]]) -> None:
    """Write the reliability bins of each system."""
    rows = (
        (system, part.low, part.high, part.rows, part.confidence, part.accuracy)
        for system, bins in curves.items()
        for part in bins
    )
    write_table(path, ["system", "low", "high", "rows", "confidence", "accuracy"], rows)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV with six decimals; see `gptj8.runtime.tables.write_csv`."""
    write_csv(path, (dict(zip(header, row, strict=True)) for row in rows), header, decimals=6)


def _write_predictions(
    path: Path,
    test: pd.DataFrame,
    answers: Mapping[str, Sequence[str] | np.ndarray],
    confidences: Mapping[str, Sequence[float]],
) -> None:
    """Write one row per answered test row.

    A row has the start of its text, the correct answer, and the predicted label and generated text
    of each system, each followed by its confidence if there is one. Of generated texts, there may
    be fewer than rows.
    """
    question, answer = ("prompt", "completion") if "completion" in test else ("text", "label")
    rows = test.head(max(map(len, answers.values()), default=0))
    starts = [" ".join(text[: 4 * _TEXT_START].split())[:_TEXT_START] for text in rows[question]]
    columns: dict[str, Iterable[Any]] = {"file": rows["file"], "row": rows["row"], question: starts}
    columns[answer] = rows[answer] if len(rows) else ()
    for name, given in answers.items():
        columns[name] = [*given, *[""] * (len(rows) - len(given))]
        if name in confidences:
            sure = [float(value) for value in confidences[name]]
            columns[f"{name}{CONFIDENCE}"] = [*sure, *[""] * (len(rows) - len(sure))]
    write_table(path, list(columns), zip(*columns.values(), strict=True))


def _write_perplexity(
    path: Path, documents: pd.DataFrame, scores: Mapping[str, DocumentScores]
) -> None:
    tokens = next(iter(scores.values())).tokens
    columns = [documents["file"], documents["row"], tokens, *(s.nll for s in scores.values())]
    header = ["file", "row", "tokens", *(f"{system}_nll" for system in scores)]
    write_table(path, header, zip(*columns, strict=True))
