"""Shapes of files that projects have, with the outcome that their owners expect."""

from __future__ import annotations

import json

import pytest

from gptj8.dataset.readers.formats import read_rows, require_optional_columns
from gptj8.dataset.readers.options import ReadOptions
from gptj8.runtime.errors import UserError

COLUMNS = ReadOptions({"text": "text", "label": "label"})


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_repeated_key_counts_if_its_column_is_read(tmp_path, suffix):
    rows = [
        '{"text": "a", "label": "x", "id": 1, "id": 2}',
        '{"text": "b", "label": "x", "label": "y"}',
        '{"text": "c", "label": "z", "meta": {"k": 1, "k": 2}}',
        '{"text": {"t": 1, "t": 2}, "label": "z"}',
    ]
    path = tmp_path / f"rows{suffix}"
    path.write_text(f"[{', '.join(rows)}]" if suffix == ".json" else "\n".join(rows))
    found = read_rows(path, COLUMNS)
    problems = [None if p is None or p != p else p for p in found["problem"]]
    assert problems == [None, "has the key label twice", None, "has the key t twice"]


def test_deeply_nested_values_are_searched_without_recursion(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a", "label": "b"}])[:-1] + ', {"text": ' + "[" * 900)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_rows(path, COLUMNS)


@pytest.mark.parametrize("header", ["text,label,,", "text,label,id,id"])
def test_repeated_names_of_columns_that_are_not_read(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\na,b,,\n")
    assert read_rows(path, COLUMNS)[["text", "label"]].to_numpy().tolist() == [["a", "b"]]


def test_numbers_are_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 2.5}\n{"text": "b", "label": 2}\n')
    found = read_rows(path, COLUMNS)
    assert found["label"].tolist() == ["2.5", "2"]


def test_an_optional_column_that_no_file_has_is_an_error(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text('{"instruction": "x", "context": "y"}\n')
    files[1].write_text('{"instruction": "x"}\n{"instruction": "x", "extra": "z"}\n')
    require_optional_columns(files, COLUMNS, ["context", "extra"])
    with pytest.raises(UserError, match=r"names the column contxt, did you mean context\?"):
        require_optional_columns(files, COLUMNS, ["contxt"])
