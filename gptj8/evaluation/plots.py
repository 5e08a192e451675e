"""Plots of the evaluation report. The same scores give byte-identical files.

Images contain neither a date nor a version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptj8.evaluation.calibration import ReliabilityBin, expected_calibration_error
from gptj8.runtime.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ANNOTATED_LABELS = 30
_LARGEST_POINT = 400  # area in square points, for a bin that contains all rows
_SMALLEST_POINT = 9


def plot_confusion(
    path: Path, labels: Sequence[str], actual: Sequence[str], predicted: Sequence[str]
) -> None:
    """Draw the confusion matrix as a PNG; cells are shaded by their share of the row."""
    figure, axes = _new_figure(min(4 + 0.4 * len(labels), 16))
    if labels:
        from sklearn.metrics import confusion_matrix

        counts = confusion_matrix(actual, predicted, labels=list(labels))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        # Matplotlib would parse text between dollar signs as a formula.
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
        _draw_nothing_to_classify(axes)
    _save(figure, path)


def plot_reliability(path: Path, curves: Mapping[str, Sequence[ReliabilityBin]]) -> None:
    """Draw accuracy over confidence as a PNG; the area of a point is proportional to its rows.

    Args:
        path: path of the image.
        curves: system -> bins; a calibrated system is on the diagonal.
    """
    figure, axes = _new_figure(6)
    if any(curves.values()):
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
        for system, bins in curves.items():
            rows = np.array([part.rows for part in bins])
            confidence = [part.confidence for part in bins]
            accuracy = [part.accuracy for part in bins]
            name = f"{system}, expected calibration error {expected_calibration_error(bins):.3f}"
            # Drawn faint, because the line is unreliable between bins with few rows.
            (line,) = axes.plot(confidence, accuracy, linewidth=1, alpha=0.4, label=name)
            areas = np.maximum(_LARGEST_POINT * rows / rows.sum(), _SMALLEST_POINT)
            axes.scatter(confidence, accuracy, s=areas, color=line.get_color(), alpha=0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_aspect("equal")
        axes.set_xlabel("confidence in the predicted label")
        axes.set_ylabel("accuracy")
        axes.set_title("Reliability, test split")
        figure.legend(loc="outside lower center")  # a legend inside the axes would hide points
    else:
        _draw_nothing_to_classify(axes)
    _save(figure, path)


def _new_figure(side: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _draw_nothing_to_classify(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing to classify", ha="center", va="center")


def _save(figure: Figure, path: Path) -> None:
    with replace_file(path) as staging:
        figure.savefig(staging, format="png", dpi=100, metadata={"Software": None})
