"""Shapes of JSON in which people have rows."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from gptj8.dataset.readers.formats import read_rows
from gptj8.dataset.readers.options import ReadOptions
from gptj8.runtime.errors import UserError

BOTH = ReadOptions({"text": "text", "label": "label"})
ROWS = [["a b", "x"], ["c", "y"], ["d", "x"]]
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]


def cells(path, options=BOTH):
    rows = read_rows(path, options)
    assert rows["problem"].isna().all()
    return rows[["text", "label"]].to_numpy().tolist()


SHAPES = {
    "array": OBJECTS,
    "data": {"version": 1, "data": OBJECTS},
    "only list": {"info": {"by": "us"}, "rows": OBJECTS},
    "lists": {"text": [t for t, _ in ROWS], "label": [label for _, label in ROWS], "n": 3},
    "arrays with names": [["text", "label"], *ROWS],
    "by row name": {f"r{number}": row for number, row in enumerate(OBJECTS)},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_inside_one_value(tmp_path, shape, indent):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(SHAPES[shape], indent=indent))
    assert cells(path) == ROWS


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records", "table"])
def test_what_pandas_writes(tmp_path, orient):
    path = tmp_path / "t.json"
    pd.DataFrame(ROWS, columns=["text", "label"]).to_json(path, orient=orient)
    assert cells(path) == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_arrays_on_lines(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_text("".join(json.dumps(row) + "\n" for row in [["label", "text"], ["x", "a"]]))
    assert cells(path) == [["a", "x"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(UserError, match="has arrays and not objects; name their columns in data"):
        read_rows(path, BOTH)
    named = ReadOptions(BOTH.columns, column_names=("text", "label"))
    assert cells(path, named) == ROWS
    path.write_text('["text", "label"]\n["a"]\n{"b": 1}\n["c", "y"]\n')
    rows = read_rows(path, BOTH)
    assert rows["problem"].tolist()[:2] == [
        "has 1 items, but there are 2 names",
        "is not a JSON array, as the first one is",
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_a_row(tmp_path, indent):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(OBJECTS[0], indent=indent))
    assert cells(path) == ROWS[:1]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(chat, indent=indent))
    rows = read_rows(path, ReadOptions({"messages": "messages"}))
    assert [json.loads(cell) for cell in rows["messages"]] == [chat["messages"]]
    path.write_text(json.dumps({"messages": [chat["messages"]] * 2}, indent=indent))
    assert len(read_rows(path, ReadOptions({"messages": "messages"}))) == 2


def test_objects_that_hold_no_rows_are_named_for_what_they_hold(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"train": OBJECTS, "test": OBJECTS}))
    with pytest.raises(UserError, match="is a JSON object with rows in 'train', 'test'; write"):
        read_rows(path, BOTH)
    path.write_text(json.dumps({"name": "a", "size": 3}))
    with pytest.raises(UserError, match=r"has no column text .* its columns: name, size"):
        read_rows(path, BOTH)
    path.write_text(json.dumps({"text": ["a", "b"], "label": ["x"]}))
    with pytest.raises(UserError, match="has columns of different lengths: text 2, label 1"):
        read_rows(path, BOTH)


def test_a_damaged_first_line_of_json_lines_is_a_damaged_row(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"text": "a", "label\n' + "".join(json.dumps(o) + "\n" for o in OBJECTS))
    rows = read_rows(path, BOTH)
    assert rows["text"].dropna().tolist() == [text for text, _ in ROWS]
    assert rows["row"].tolist() == [1, 2, 3, 4] and "is not valid JSON" in rows["problem"][0]


def test_nested_names(tmp_path):
    path = tmp_path / "t.jsonl"
    row = {
        "translation": {"en": "house", "de": "Haus"},
        "answers": {"text": ["yes"], "start": [3]},
        "choices": ["a", "b"],
        "with.dot": "dot",
    }
    path.write_text(json.dumps(row) + "\n{}\n")
    names = ["translation.en", "answers.text", "choices.1", "with.dot", "choices.7", "with.other"]
    rows = read_rows(
        path, ReadOptions({"label" if n == "answers.text" else n: n for n in names},
                          optional=frozenset(names))
    )  # fmt: skip
    first = rows.iloc[0]
    assert first["translation.en"] == "house" and first["label"] == "yes"
    assert first["choices.1"] == "b" and first["with.dot"] == "dot"
    assert {first["choices.7_kind"], first["with.other_kind"]} == {"missing"}


def test_a_label_in_a_list_of_its_own(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["x", "y"]}\n')
    rows = read_rows(path, BOTH)
    assert rows["label"].tolist() == ["x", '["x", "y"]']
    assert rows["label_kind"].tolist() == ["text", "list"]


def test_columns_by_row_number_are_joined_by_the_number(tmp_path):
    path = tmp_path / "t.json"
    columns = {"text": {"0": "a", "1": "b", "2": "c"}, "label": {"0": "x", "2": "z", "1": "y"}}
    path.write_text(json.dumps(columns))
    assert cells(path) == [["a", "x"], ["b", "y"], ["c", "z"]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_arrays_of_messages_are_conversations(tmp_path, suffix):
    chats = [
        [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "b"}]
        for n in range(3)
    ]
    path = tmp_path / f"t{suffix}"
    path.write_text(json.dumps(chats) if suffix == ".json" else "\n".join(map(json.dumps, chats)))
    rows = read_rows(path, ReadOptions({"messages": "messages"}))
    assert [json.loads(cell) for cell in rows["messages"]] == chats


def test_line_separators_inside_texts_of_a_damaged_file(tmp_path):
    path = tmp_path / "t.json"
    text = "a\u2028b\x85c"
    path.write_text(f'{{"text": \n{{"text": "{text}", "label": "x"}}\n', encoding="utf-8")
    rows = read_rows(path, BOTH)
    assert rows["text"].dropna().tolist() == [text]
