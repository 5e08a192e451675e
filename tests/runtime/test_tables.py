"""Tests of CSV files and of aligned tables."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

from gptj8.runtime.tables import format_table, write_csv


def test_csv_has_all_columns(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": 2, "b": "x,y"}], ["a"])
    assert (tmp_path / "a.csv").read_text() == 'a,b\n1,\n2,"x,y"\n'


def test_an_empty_table_has_its_header(tmp_path):
    """DVC plots cannot read a file without a header."""
    write_csv(tmp_path / "a.csv", [], ["step", "loss"])
    assert (tmp_path / "a.csv").read_text() == "step,loss\n"
    assert list(pd.read_csv(tmp_path / "a.csv")) == ["step", "loss"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@import", "'@import"),
        ("+49 30", "'+49 30"),
        ("-", "'-"),
        ("\tx", "'\tx"),
        ("-1.5", "-1.5"),
        ("+2e3", "+2e3"),
        ("a=b", "a=b"),
        ("line\r\nline\rline", "line\nline\nline"),
        ("", ""),
    ],
)
def test_cells_that_a_spreadsheet_would_run_are_escaped(tmp_path, cell, written):
    write_csv(tmp_path / "a.csv", [{"text": cell, "other": 1}], ["text"])
    with open(tmp_path / "a.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row == {"text": written, "other": "1"}


def test_floats_are_exact_or_have_decimals(tmp_path):
    write_csv(tmp_path / "a.csv", [{"x": 0.1 + 0.2, "n": 3}], ["x", "n"])
    assert float(pd.read_csv(tmp_path / "a.csv")["x"][0]) == 0.1 + 0.2
    write_csv(tmp_path / "b.csv", [{"x": 0.1 + 0.2, "n": 3}], ["x", "n"], decimals=6)
    assert (tmp_path / "b.csv").read_text() == "x,n\n0.300000,3\n"


def test_columns_are_aligned_and_numbers_are_kept_as_written():
    rows = [["  indented", "1,000", "a"], ["wide name", "0.10", ""]]
    assert format_table(rows, ["name", "value", "more"]) == [
        "name          value    more",
        "  indented    1,000       a",
        "wide name      0.10",
    ]


def test_markdown():
    assert format_table([["a", "1"]], ["name", "value"], style="pipe") == [
        "| name   |   value |",
        "|:-------|--------:|",
        "| a      |       1 |",
    ]


def test_a_table_without_rows():
    assert format_table([], ["name", "value"])[0].split() == ["name", "value"]
