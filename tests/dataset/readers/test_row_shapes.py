"""Tests of converting the user's columns to the fields of a task."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from gptj8.dataset.readers.row_shapes import conversation_problem, shape_of
from gptj8.params.sections import Data
from gptj8.params.templates import parse_template

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
    assert fields(data, row) == [("It rains.\nHypothesis: It is wet.", "yes")]
    assert shape.column_of("text") == "premise, hypothesis"
    assert shape.prompt_template.format(text=fields(data, row)[0][0]) == template.format(
        premise="It rains.", hypothesis="It is wet."
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


@pytest.mark.parametrize(("who", "what"), [("role", "content"), ("from", "value")])
def test_conversation_is_split_at_its_last_answer(who: str, what: str) -> None:
    names = {"role": ("user", "assistant"), "from": ("human", "gpt")}[who]
    messages = [
        {who: "system", what: "Be brief."},
        {who: names[0], what: "Hi "},
        {who: names[1], what: "Hello."},
        {who: names[0], what: "Who are you?"},
        {who: names[1], what: " A model.\n"},
    ]
    data = Data(train="x", task="completion", prompt_template="{messages}\nassistant:")
    prompt = "system: Be brief.\nuser: Hi\nassistant: Hello.\nuser: Who are you?"
    assert conversation_problem(json.dumps(messages)) is None
    assert fields(data, {"messages": json.dumps(messages)}) == [(prompt, "A model.")]
    assert shape_of(data).prompt_template == "{prompt}\nassistant:"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("[hello", "is not a list of messages"),
        ({"role": "user"}, "is not a list of messages"),
        ([{"role": "user", "content": "\u200b"}], "message 1 is empty"),
        ([], "fewer than two messages"),
        ([{"role": "user", "content": "a"}], "fewer than two messages"),
        (["a", "b"], "message 1 has no valid role"),
        ([{"role": "robot", "content": "a"}], "message 1 has no valid role (system, user"),
        ([{"role": 1, "content": "a"}], "message 1 has no valid role"),
        ([{"role": "user", "content": ["a"]}], "message 1 has no text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 2 has no text"),
        ([{"role": "user", "content": " "}], "message 1 is empty"),
        ([{"role": "user", "content": "a"}] * 2, "does not end with the assistant's answer"),
        ([{"role": "assistant", "content": "a"}] * 2, "no message from the user"),
    ],
)
def test_invalid_conversations(messages: object, problem: str) -> None:
    cell = messages if isinstance(messages, str) else json.dumps(messages)
    assert problem in (conversation_problem(cell) or "")


def test_only_column_of_a_prompt_is_never_optional() -> None:
    assert not shape_of(Data(train="x", optional_columns=("text",))).optional
