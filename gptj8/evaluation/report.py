"""The files of the evaluation's report: tables for people and spreadsheets, and plots.

The same scores give the same bytes: rows keep the dataset's order and numbers have six decimals.
"""

from __future__ import annotations

import csv
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
from gptj8.evaluation.systems import ORIGINAL, TUNED
from gptj8.model.scoring.perplexity import DocumentScores
from gptj8.runtime.files import replace_file

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
) -> None:
    """Write predictions.csv, perplexity.csv, confusion_matrix.csv and confusion_matrix.png.

    All four are always written, because DVC misses an output that is not: where there is nothing to
    classify, a table has no rows and the plot says so.

    Args:
        directory: created if need be.
        test: the test split, with `file` and `row`, and `text` and `label` for a classification.
        documents: `file` and `row` of each document that perplexity was measured on.
        labels: all labels, in the order of the plot's axes; empty: nothing was classified.
        predictions: system -> (test rows,) labels; the confusion matrix is that of `tuned`.
        scores: system -> scores of the documents, the same tokens for all.
        generated: system -> what it wrote for the first rows.
    """
    actual = list(test["label"]) if labels else []
    predicted = list(predictions[TUNED]) if labels else []
    confusion = zip(actual, predicted, strict=True)
    write_table(directory / "confusion_matrix.csv", ["actual", "predicted"], confusion)
    _write_predictions(directory / "predictions.csv", test, predictions, generated or {})
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

    All four are always written, as by `write_reports`: without labels the tables have no rows and
    the plot says so.

    Args:
        directory: created if need be.
        labels: all labels; empty: nothing was classified.
        actual: (test rows,) true labels, each one of `labels`.
        predictions: system -> (test rows,) labels; what is not one of `labels` is wrong.
        likelihoods: system -> (test rows, labels) log-likelihoods, of the systems that have them;
            the plot shows `tuned` and `base`.
        resamples: of the bootstrap that compares two systems.
        seed: of the bootstrap.
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
    """Write precision, recall, F1 and the number of actual rows of each label by each system.

    Precision is 0 for a label never predicted, recall for one without rows, F1 for want of either.
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
    """Write for each two systems the difference of their accuracies, first - second, and its test.

    `low` and `high` bound it with 95 % confidence (`accuracy_difference`), `p_value` is that of
    `mcnemar`. Every pair starts from the same seed: another system changes no other's interval.
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
        rows.append((first, second, *accuracies, *interval, *counts, test.p_value))
    header = ["first", "second", "accuracy_first", "accuracy_second", "difference", "low", "high"]
    write_table(path, [*header, "only_first", "only_second", "p_value"], rows)


def write_reliability(path: Path, curves: Mapping[str, Sequence[ReliabilityBin]]) -> None:
    """Write the bins of each system."""
    rows = (
        (system, part.low, part.high, part.rows, part.confidence, part.accuracy)
        for system, bins in curves.items()
        for part in bins
    )
    write_table(path, ["system", "low", "high", "rows", "confidence", "accuracy"], rows)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV whose cells no spreadsheet takes for a formula."""
    with (
        replace_file(path) as staging,
        open(staging, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_inert(cell) for cell in row] for row in rows)


def _inert(cell: Any) -> Any:
    """Quote text that a spreadsheet would run: it then shows an apostrophe, or nothing."""
    if isinstance(cell, float):
        return f"{cell:.6f}"
    if not isinstance(cell, str):
        return cell
    # The csv module leaves a lone carriage return unquoted, and readers take it for a row's end.
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    runs = cell[:1] in tuple("=+-@\t\n") and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if runs else cell


def _write_predictions(
    path: Path,
    test: pd.DataFrame,
    predictions: Mapping[str, np.ndarray],
    generated: Mapping[str, Sequence[str]],
) -> None:
    """Write a row for each that was answered: the beginning of its text, what is right, and each
    system's label and, where it wrote one, its own words."""
    question, answer = ("prompt", "completion") if "completion" in test else ("text", "label")
    header = ["file", "row", question, answer]
    written = max((len(texts) for texts in generated.values()), default=0)
    rows = test if predictions else test.head(written)
    if not predictions and not generated:
        write_table(path, header, [])
        return
    starts = [" ".join(text[: 4 * _TEXT_START].split())[:_TEXT_START] for text in rows[question]]
    texts = [[*texts, *[""] * (len(rows) - len(texts))] for texts in generated.values()]
    columns = [rows["file"], rows["row"], starts, rows[answer], *predictions.values(), *texts]
    header += [*predictions, *(f"{system}_wrote" for system in generated)]
    write_table(path, header, zip(*columns, strict=True))


def _write_perplexity(
    path: Path, documents: pd.DataFrame, scores: Mapping[str, DocumentScores]
) -> None:
    tokens = next(iter(scores.values())).tokens
    columns = [documents["file"], documents["row"], tokens, *(s.nll for s in scores.values())]
    header = ["file", "row", "tokens", *(f"{system}_nll" for system in scores)]
    write_table(path, header, zip(*columns, strict=True))
