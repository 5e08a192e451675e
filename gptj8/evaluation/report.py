"""The files of the evaluation's report: tables for people and spreadsheets, and a plot.

The same scores give the same bytes: rows keep the dataset's order, numbers have six decimals, and
the image carries neither a date nor a version.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gptj8.evaluation.perplexity import DocumentScores
from gptj8.files import replace_file

_TEXT_START = 120  # characters
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_MOST_ANNOTATED_LABELS = 30


def write_reports(
    directory: Path,
    test: pd.DataFrame,
    documents: pd.DataFrame,
    labels: Sequence[str],
    predictions: Mapping[str, np.ndarray],
    scores: Mapping[str, DocumentScores],
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
    """
    actual = list(test["label"]) if labels else []
    predicted = list(predictions["tuned"]) if labels else []
    confusion = zip(actual, predicted, strict=True)
    write_table(directory / "confusion_matrix.csv", ["actual", "predicted"], confusion)
    _write_predictions(directory / "predictions.csv", test, predictions)
    _write_perplexity(directory / "perplexity.csv", documents, scores)
    plot_confusion(directory / "confusion_matrix.png", labels, actual, predicted)


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
    path: Path, test: pd.DataFrame, predictions: Mapping[str, np.ndarray]
) -> None:
    if not predictions:
        write_table(path, ["file", "row", "text", "label"], [])
        return
    starts = [" ".join(text[: 4 * _TEXT_START].split())[:_TEXT_START] for text in test["text"]]
    columns = [test["file"], test["row"], starts, test["label"], *predictions.values()]
    write_table(path, ["file", "row", "text", "label", *predictions], zip(*columns, strict=True))


def _write_perplexity(
    path: Path, documents: pd.DataFrame, scores: Mapping[str, DocumentScores]
) -> None:
    tokens = next(iter(scores.values())).tokens
    columns = [documents["file"], documents["row"], tokens, *(s.nll for s in scores.values())]
    header = ["file", "row", "tokens", *(f"{system}_nll" for system in scores)]
    write_table(path, header, zip(*columns, strict=True))


def plot_confusion(
    path: Path, labels: Sequence[str], actual: Sequence[str], predicted: Sequence[str]
) -> None:
    """Draw counts, shaded by their share of the actual label's rows, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(4 + 0.4 * len(labels), 16)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if labels:
        from sklearn.metrics import confusion_matrix

        counts = confusion_matrix(actual, predicted, labels=list(labels))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        # A label is data: a dollar sign in it is no formula.
        names = [str(label).replace("$", r"\$")[:40] for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90)
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("actual")
        axes.set_title("Fine-tuned model, test split")
        if len(labels) <= _MOST_ANNOTATED_LABELS:
            for row, column in np.ndindex(*counts.shape):
                color = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=color)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to classify", ha="center", va="center")
    with replace_file(path) as staging:
        figure.savefig(staging, format="png", dpi=100, metadata={"Software": None})
