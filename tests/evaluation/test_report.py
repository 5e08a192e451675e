"""The report files are correct, safe to open in a spreadsheet and reproducible."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, classification_report

from gptj8.evaluation.calibration import ReliabilityBin
from gptj8.evaluation.plots import plot_reliability
from gptj8.evaluation.report import write_classification_reports, write_reports, write_table
from gptj8.model.scoring.perplexity import DocumentScores
from tests.helpers.paths import ROOT

FILES = ["confusion_matrix.csv", "confusion_matrix.png", "perplexity.csv", "predictions.csv"]
CLASSIFICATION_FILES = ["comparisons.csv", "per_class.csv", "reliability.csv", "reliability.png"]


@pytest.fixture
def test_rows():
    return pd.DataFrame(
        {
            "text": ["=HYPERLINK(1)", "two\nlines, and a comma", "x" * 500],
            "label": ["a", "-1", "$b_c$"],
            "file": ["data/my.csv"] * 3,
            "row": [1, 2, 5],
        }
    )


def write(directory, rows, labels):
    predictions = {}
    if labels:
        predictions = {
            "tuned": np.array(["a", "a", "-1"], dtype=object),
            "baseline": np.array(["-1", "a", "$b_c$"], dtype=object),
        }
    scores = {
        name: DocumentScores(np.array([1.5, 2.0, factor]), np.array([1, 2, 3]))
        for name, factor in (("base", 1 / 3), ("tuned", 0.25))
    }
    write_reports(directory, rows, rows, labels, predictions, scores)
    return {name: (directory / name).read_bytes() for name in FILES}


def read(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_files_of_a_classification(tmp_path, test_rows):
    first = write(tmp_path / "1", test_rows, ["$b_c$", "-1", "a"])
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == FILES
    assert first == write(tmp_path / "2", test_rows, ["$b_c$", "-1", "a"])

    confusion = read(tmp_path / "1" / "confusion_matrix.csv")
    assert [tuple(row.values()) for row in confusion] == [("a", "a"), ("-1", "a"), ("$b_c$", "-1")]
    assert list(confusion[0]) == ["actual", "predicted"]

    predictions = read(tmp_path / "1" / "predictions.csv")
    assert list(predictions[0]) == ["file", "row", "text", "label", "tuned", "baseline"]
    assert [row["text"] for row in predictions] == [
        "'=HYPERLINK(1)",
        "two lines, and a comma",
        "x" * 120,
    ]
    assert [row["row"] for row in predictions] == ["1", "2", "5"]

    perplexity = read(tmp_path / "1" / "perplexity.csv")
    assert perplexity[2] == {
        "file": "data/my.csv",
        "row": "5",
        "tokens": "3",
        "base_nll": "0.333333",
        "tuned_nll": "0.250000",
    }


def test_files_exist_without_labels(tmp_path, test_rows):
    files = write(tmp_path, test_rows[["text", "file", "row"]], [])
    assert files["confusion_matrix.csv"] == b"actual,predicted\n"
    assert files["predictions.csv"] == b"file,row,text,label\n"
    assert files["confusion_matrix.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1"])
def test_formulas_are_escaped(tmp_path, cell):
    write_table(tmp_path / "t.csv", ["a"], [[cell]])
    assert read(tmp_path / "t.csv")[0]["a"] == f"'{cell}"


def test_carriage_return_does_not_end_a_row(tmp_path):
    write_table(tmp_path / "t.csv", ["a", "b"], [["x\ry", "\r\n=1"]])
    assert read(tmp_path / "t.csv") == [{"a": "x\ny", "b": "'\n=1"}]


@pytest.mark.parametrize("cell", ["-1", "+1.5", "a=b", "", "'x"])
def test_harmless_cells_are_not_changed(tmp_path, cell):
    write_table(tmp_path / "t.csv", ["a", "b"], [[cell, 1]])
    assert read(tmp_path / "t.csv")[0]["a"] == cell


def test_classification_files_are_byte_identical(tmp_path):
    first = write_classified(tmp_path / "1", *classified())
    assert first == write_classified(tmp_path / "2", *classified())
    assert first["reliability.png"].startswith(b"\x89PNG")


def classified(rows=60, seed=0):
    """Return labels, true labels, predictions of three systems and log-likelihoods of two."""
    rng = np.random.default_rng(seed)
    labels = ["-1", "$b_c$", "=a"]
    actual = rng.choice(labels, rows).astype(object)
    likelihoods = {}
    for system, gain in (("base", 0.5), ("tuned", 3.0)):
        likelihoods[system] = rng.normal(-5, 1, (rows, 3))
        likelihoods[system][np.arange(rows), [labels.index(label) for label in actual]] += gain
    predictions = {s: np.array(labels, object)[v.argmax(1)] for s, v in likelihoods.items()}
    predictions["outside"] = np.where(rng.random(rows) < 0.3, "no label", actual).astype(object)
    return labels, actual, predictions, likelihoods


def write_classified(directory, *data, seed=0):
    write_classification_reports(directory, *data, resamples=200, seed=seed)
    assert sorted(path.name for path in directory.iterdir()) == CLASSIFICATION_FILES
    return {name: (directory / name).read_bytes() for name in CLASSIFICATION_FILES}


def test_files_are_byte_identical_in_another_process(tmp_path):
    first = write_classified(tmp_path / "1", *classified())
    assert first == write_classified(tmp_path / "2", *classified())
    assert first["reliability.png"].startswith(b"\x89PNG")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.evaluation.test_report import classified, write_classified\n"
        "write_classified(Path(sys.argv[1]), *classified())\n"
    )
    arguments = [str(tmp_path / "3"), str(ROOT)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    assert first == {name: (tmp_path / "3" / name).read_bytes() for name in first}


def test_per_class_equals_scikit_learn(tmp_path):
    labels, actual, predictions, likelihoods = classified()
    predictions["never"] = np.full(60, "-1", dtype=object)
    write_classified(tmp_path, labels, actual, predictions, likelihoods)
    rows = read(tmp_path / "per_class.csv")
    assert [(row["system"], row["label"]) for row in rows[:4]] == [
        ("base", "-1"),
        ("base", "$b_c$"),
        ("base", "'=a"),
        ("tuned", "-1"),
    ]
    assert len(rows) == 4 * 3
    for row in rows:
        report = classification_report(
            actual, predictions[row["system"]], output_dict=True, zero_division=0
        )[row["label"].lstrip("'")]
        report["f1"] = report["f1-score"]
        for name in ("precision", "recall", "f1", "support"):
            assert float(row[name]) == pytest.approx(report[name], abs=1e-6)
    assert [row["precision"] for row in rows[-2:]] == ["0.000000"] * 2


def test_comparisons_equal_manual_calculations(tmp_path):
    labels, actual, predictions, likelihoods = classified()
    write_classified(tmp_path, labels, actual, predictions, likelihoods)
    rows = read(tmp_path / "comparisons.csv")
    pairs = [("base", "tuned"), ("base", "outside"), ("tuned", "outside")]
    assert [(row["first"], row["second"]) for row in rows] == pairs
    assert len({row["p_value"] for row in rows}) == 3
    for row, (first, second) in zip(rows, pairs, strict=True):
        accuracies = [accuracy_score(actual, predictions[name]) for name in (first, second)]
        assert float(row["accuracy_first"]) == pytest.approx(accuracies[0], abs=1e-6)
        assert float(row["accuracy_second"]) == pytest.approx(accuracies[1], abs=1e-6)
        assert float(row["difference"]) == pytest.approx(accuracies[0] - accuracies[1], abs=2e-6)
        assert float(row["low"]) < float(row["difference"]) < float(row["high"])
        triples = list(zip(actual, predictions[first], predictions[second], strict=True))
        assert int(row["only_first"]) == sum(one == truth != two for truth, one, two in triples)
        assert int(row["only_second"]) == sum(two == truth != one for truth, one, two in triples)
    assert float(rows[0]["high"]) < 0 and float(rows[0]["p_value"]) < 0.01


@pytest.mark.parametrize("rows", [40, 2000])
def test_small_p_values_are_written(tmp_path, rows):
    actual = np.array(["a"] * rows, dtype=object)
    predictions = {"tuned": actual, "base": np.array(["b"] * rows, dtype=object)}
    write_classified(tmp_path, ["a", "b"], actual, predictions, {})
    (row,) = read(tmp_path / "comparisons.csv")
    expected = max(2 / 2**rows, sys.float_info.min) if rows < 1000 else sys.float_info.min
    assert float(row["p_value"]) == pytest.approx(expected, rel=1e-5)
    assert float(row["p_value"]) > 0


def test_confidences_follow_their_answers(tmp_path, test_rows):
    predictions = {"tuned": np.array(["a", "a", "b"], object), "mine": np.array(["a"] * 3, object)}
    generated = {"tuned": ["x", "=y"]}
    confidences = {"tuned": [0.5, 0.75, 1 / 3], "tuned_wrote": [0.25, 0.125]}
    write_reports(tmp_path, test_rows, test_rows, ["a", "b"], predictions, {"base": DocumentScores(
        np.array([1.5, 2.0, 1.0]), np.array([1, 2, 3])
    )}, generated, confidences)  # fmt: skip
    rows = read(tmp_path / "predictions.csv")
    expected = ["tuned", "tuned_confidence", "mine", "tuned_wrote", "tuned_wrote_confidence"]
    assert list(rows[0])[4:] == expected
    assert [[row[name] for name in expected] for row in rows] == [
        ["a", "0.500000", "a", "x", "0.250000"],
        ["a", "0.750000", "a", "'=y", "0.125000"],
        ["b", "0.333333", "a", "", ""],
    ]


def test_adding_a_system_does_not_change_other_intervals(tmp_path):
    labels, actual, predictions, likelihoods = classified()
    write_classified(tmp_path / "1", labels, actual, predictions, likelihoods)
    more = {"first": predictions["outside"], **predictions}
    write_classified(tmp_path / "2", labels, actual, more, likelihoods)
    assert read(tmp_path / "2" / "comparisons.csv")[3:] == read(tmp_path / "1" / "comparisons.csv")
    write_classified(tmp_path / "3", labels, actual, predictions, likelihoods, seed=1)
    assert read(tmp_path / "3" / "comparisons.csv") != read(tmp_path / "1" / "comparisons.csv")


def test_reliability_covers_all_rows_of_systems_with_likelihoods(tmp_path):
    labels, actual, predictions, likelihoods = classified()
    write_classified(tmp_path, labels, actual, predictions, likelihoods)
    rows = read(tmp_path / "reliability.csv")
    assert list(rows[0]) == ["system", "low", "high", "rows", "confidence", "accuracy"]
    for system in ("base", "tuned"):
        bins = [row for row in rows if row["system"] == system]
        assert sum(int(row["rows"]) for row in bins) == 60
        right = sum(float(row["accuracy"]) * int(row["rows"]) for row in bins)
        assert right / 60 == pytest.approx((predictions[system] == actual).mean(), abs=1e-5)
        for row in bins:
            assert float(row["low"]) < float(row["confidence"]) <= float(row["high"])
    assert {row["system"] for row in rows} == {"base", "tuned"}


def test_plot_depends_on_the_curves(tmp_path):
    half = [ReliabilityBin(0.4, 0.6, 5, 0.5, 0.5), ReliabilityBin(0.8, 1.0, 5, 0.9, 0.7)]
    other = [ReliabilityBin(0.4, 0.6, 9, 0.5, 0.5), ReliabilityBin(0.8, 1.0, 1, 0.9, 0.7)]
    images = []
    for curves in ({}, {"tuned": half}, {"tuned": other}, {"tuned": half, "base": other}):
        plot_reliability(tmp_path / "plot.png", curves)
        images.append((tmp_path / "plot.png").read_bytes())
    assert len(set(images)) == 4


@pytest.mark.parametrize("predictions", [{}, {"tuned": np.array([], dtype=object)}])
def test_classification_files_exist_without_labels(tmp_path, predictions):
    files = write_classified(tmp_path, [], [], predictions, {})
    assert files["per_class.csv"] == b"system,label,precision,recall,f1,support\n"
    assert files["reliability.csv"] == b"system,low,high,rows,confidence,accuracy\n"
    assert files["comparisons.csv"] == (
        b"first,second,accuracy_first,accuracy_second,difference,low,high,"
        b"only_first,only_second,p_value\n"
    )
    plot_reliability(tmp_path / "empty.png", {})
    assert files["reliability.png"] == (tmp_path / "empty.png").read_bytes()
