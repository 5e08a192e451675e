"""The report's files: right, inert in a spreadsheet, and the same bytes again."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

from gptj8.evaluation.perplexity import DocumentScores
from gptj8.evaluation.report import write_reports, write_table

FILES = ["confusion_matrix.csv", "confusion_matrix.png", "perplexity.csv", "predictions.csv"]


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


def test_files_exist_where_there_is_nothing_to_classify(tmp_path, test_rows):
    files = write(tmp_path, test_rows[["text", "file", "row"]], [])
    assert files["confusion_matrix.csv"] == b"actual,predicted\n"
    assert files["predictions.csv"] == b"file,row,text,label\n"
    assert files["confusion_matrix.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1"])
def test_formulas_are_quoted(tmp_path, cell):
    write_table(tmp_path / "t.csv", ["a"], [[cell]])
    assert read(tmp_path / "t.csv")[0]["a"] == f"'{cell}"


def test_a_carriage_return_does_not_end_a_row(tmp_path):
    write_table(tmp_path / "t.csv", ["a", "b"], [["x\ry", "\r\n=1"]])
    assert read(tmp_path / "t.csv") == [{"a": "x\ny", "b": "'\n=1"}]


@pytest.mark.parametrize("cell", ["-1", "+1.5", "a=b", "", "'x"])
def test_harmless_cells_stay(tmp_path, cell):
    write_table(tmp_path / "t.csv", ["a", "b"], [[cell, 1]])
    assert read(tmp_path / "t.csv")[0]["a"] == cell
