"""Tests of converting the user's columns to the fields of a task."""

from __future__ import annotations

import json
from contextlib import suppress

import pandas as pd
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.params.sections import Data
from gptj8.params.templates import parse_template
from tests.helpers.validate_project import make_project, run_stage, write_params

INSTRUCTION = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def fields(data: Data, *rows: dict) -> list[tuple]:
    frame = pd.DataFrame(rows).astype("str" if rows else object)
    return list(shape_of(data).to_fields(frame).itertuples(index=False, name=None))


def test_single_field_is_unchanged() -> None:
    data = Data(train="x", text_column="tweet", label_column="class")
    shape = shape_of(data)
    assert shape.columns == {"text": "tweet", "label": "class"}
    assert fields(data, {"text": " a\n", "label": " b c "}) == [(" a\n", "b c")]
    assert shape.prompt_template == "{text}\n\nLabel:"
    assert shape.column_of("text") == "tweet"


def test_several_columns_are_joined_into_one_text() -> None:
    template = "Premise: {premise}\nHypothesis: {hypothesis}\nFollows:"
    data = Data(train="x", prompt_template=template)
    shape = shape_of(data)
    assert shape.prompt_template == "Premise: {text}\nFollows:"
    row = {"premise": "It rains.", "hypothesis": " It is wet. ", "label": "yes"}
    assert fields(data, row) == [("It rains.\nHypothesis:  It is wet. ", "yes")]
    assert shape.column_of("text") == "premise, hypothesis"
    assert shape.prompt_template.format(text=fields(data, row)[0][0]) == template.format(
        premise="It rains.", hypothesis=" It is wet. "
    )


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_instruction_without_input(empty: str | None) -> None:
    data = Data(
        train="x", task="completion", completion_column="output", prompt_template=INSTRUCTION
    )
    shape = shape_of(data)
    assert shape.optional == {"input"}
    assert shape.columns == {
        "instruction": "instruction",
        "input": "input",
        "completion": "output",
    }
    row = {"instruction": "Add.", "input": "1, 2", "completion": "3"}
    assert fields(data, row) == [("Add.\n\n### Input:\n1, 2", "3")]
    frame = pd.DataFrame([row | {"input": empty}], dtype="str")
    assert shape.to_fields(frame)["prompt"].tolist() == ["Add."]
    assert shape.prompt_template == "### Instruction:\n{prompt}\n\n### Response:\n"


def test_braces_around_the_fields_are_kept() -> None:
    template = parse_template("{{json}} {text} {{}}", "classification")
    assert template.outer("text").format(text="x") == "{json} x {}"


def test_a_conversation_may_have_columns_beside_its_messages() -> None:
    template = "{messages}\nassistant:"
    shape = shape_of(Data(train="x", task="completion", prompt_template=template, tools_column="f"))
    assert shape.is_conversation
    assert shape.columns == {"messages": "messages", "tools": "f", "system": "system"}
    assert shape.optional == {"tools", "system"} and shape.expected == []
    assert shape.column_of("prompt") == shape.column_of("messages") == "messages"
    asked = [{"role": "user", "content": "a"}]
    found = shape.conversation_of({"messages": asked, "system": "Be brief.", "f": [{"name": "g"}]})
    assert [message["content"] for message in found.messages] == ["Be brief.", "a"]
    assert found.tools == ({"type": "function", "function": {"name": "g"}},)
    with pytest.raises(ValueError, match=r"^messages has no messages"):
        shape.conversation_of({"messages": []})


def test_only_column_of_a_prompt_is_never_optional() -> None:
    assert not shape_of(Data(train="x", optional_columns=("text",))).optional


def test_nested_columns_and_lists_of_a_row_to_answer():
    data = Data(
        train="t.jsonl",
        task="completion",
        prompt_template="{translation.en}\n{choices}\n{choices.1}",
        completion_column="translation.de",
    )
    shape = shape_of(data)
    expected = "house\na\nb\nb"
    assert shape.text_of({"translation": {"en": "house"}, "choices": ["a", "b"]}) == expected
    named = {"translation.en": "house", "choices": "a\nb", "choices.1": "b"}
    assert shape.text_of(named) == expected
    with pytest.raises(ValueError, match="choices is a list, not text"):
        shape.text_of({"translation.en": "house", "choices": [{}], "choices.1": "b"})


def test_cells_of_a_row_to_answer_become_the_text_that_they_have_in_training(tmp_path) -> None:
    """`validate` reads the same cells from a file."""
    cells = [3, -0.0, 2.5, 4.0, 1e300, 10**25, True, False, None, "3", " a ", "", "\u200b"]
    refused = [{"a": 1}, [{"a": 1}], []]
    rows = [{"x": cell, "y": "b", "label": f"l{n % 2}"} for n, cell in enumerate(cells + refused)]
    project = make_project(tmp_path)
    (project / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{y}: {x}\nLabel:"
    write_params(project, train="numbers.jsonl", prompt_template=template, max_invalid_fraction=0.9)
    done = run_stage(project)
    assert done.returncode == 0, done.stderr
    prepared = load_prepared(project / "artifacts" / "dataset")
    splits = pd.concat([prepared.split(name) for name in SPLITS])
    texts = dict(zip(splits["row"], splits["text"], strict=True))
    shape = shape_of(Data(train="numbers.jsonl", prompt_template=template))
    served = {}
    for number, row in enumerate(rows, 1):
        with suppress(ValueError):
            served[number] = shape.text_of({"x": row["x"], "y": row["y"]})
    assert served[1] == "b: 3" and len(served) >= 9
    duplicates = {number for number in served if number not in texts}
    assert {served[number] for number in duplicates} <= set(texts.values())
    assert {number: served[number] for number in texts} == texts
