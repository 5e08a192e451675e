"""A row becomes the very prompt of training; the labels' probabilities are the model's."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from gptj8.dataset.prepared.prompts import PromptEncoder, TextEncoder
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.params.sections import parse_params
from gptj8.serving.predictor import AnswerStream
from tests.helpers.served_models import LABELS, TASKS, data_of

CHAT = [
    {"role": "system", "content": "be a fox"},
    {"from": "human", "value": "jump over the dog"},
]
ROWS = {
    "classification": [
        {"text": "the quick brown fox"},
        {"text": "  jumps <|endoftext|> over\n", "label": "fox"},
        {"text": "lazy dog " * 80},
    ],
    "columns": [
        {"title": "seven wizards", "body": "box with jugs"},
        {"title": "seven wizards", "body": None},
        {"title": "seven wizards"},
        {"title": "seven wizards", "body": " "},
    ],
    "instructions": [
        {"instruction": "jump", "input": "over the dog"},
        {"instruction": "jump", "input": None},
        {"instruction": "jump"},
    ],
    "messages": [{"chat": CHAT}, {"chat": json.dumps(CHAT)}],
}
ANSWERS = {
    "classification": {"label": LABELS[1]},
    "columns": {"label": LABELS[1]},
    "instructions": {"output": "the dog"},
    "messages": {},
}


def trained_prompt(task, row, base):
    """What validate makes of a row: the table's fields, then an example with its answer."""
    data = parse_params({"data": data_of(task), "model": {"path": "m"}}).data
    shape = shape_of(data)
    cells = {field: row.get(column) for field, column in shape.columns.items()}
    if task == "messages":
        chat = json.loads(row["chat"]) if isinstance(row["chat"], str) else row["chat"]
        cells["messages"] = json.dumps([*chat, {"role": "assistant", "content": "the dog"}])
    else:
        cells[shape.answer] = next(iter(ANSWERS[task].values()))
    table = pd.DataFrame({name: pd.array([cell], dtype="str") for name, cell in cells.items()})
    fields = shape.to_fields(table).iloc[0]
    encoder = PromptEncoder(
        TextEncoder.load(base), shape.prompt_template, data.max_length, shape.truncation_side
    )
    example = encoder.example(fields[shape.input], fields[shape.answer])
    return example.ids[: example.prompt_length], len(example.ids) - example.prompt_length


@pytest.mark.parametrize(
    ("task", "number"), [(task, n) for task in TASKS for n in range(len(ROWS[task]))]
)
def test_a_row_becomes_the_prompt_of_training(predictors, tiny_8bit_dir, task, number):
    row = ROWS[task][number]
    expected, answer_tokens = trained_prompt(task, row, tiny_8bit_dir)
    assert predictors[task].encode_row(row, answer_tokens).ids == expected


def test_a_long_row_is_cut_at_its_text_and_says_so(predictors):
    encoded = predictors["classification"].encode_row({"text": "lazy dog " * 80}, 5)
    assert len(encoded.ids) == 96 - 5
    assert encoded.cut_tokens > 0
    text = predictors["classification"].encoder.decode(encoded.ids)
    assert text.startswith("lazy dog")
    assert text.endswith("\n\nLabel:")


def test_names_of_special_tokens_are_text(predictors):
    predictor = predictors["classification"]
    encoder = predictor.encoder
    assert encoder.eos_id not in predictor.encode_prompt("a <|endoftext|> b")
    assert encoder.eos_id not in predictor.encode_row({"text": "<|endoftext|>"}, 5).ids
    assert "<|endoftext|>" in encoder.decode(predictor.encode_prompt("a <|endoftext|> b"))


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("classification", {}, "text is missing"),
        ("classification", {"TEXT": "a"}, "TEXT is no column, did you mean text"),
        ("classification", {"text": " \n\u200b"}, "text is empty"),
        ("classification", {"text": None}, "text is empty"),
        ("classification", {"text": 7}, "text is not a text"),
        ("classification", {"text": ["a"]}, "text is not a text"),
        ("classification", {"text": "a\ud800"}, "half a character"),
        ("columns", {"body": "a"}, "title is missing"),
        ("columns", {"title": "a", "body": 1.5}, "body is not a text"),
        ("instructions", {"input": "a"}, "instruction is missing"),
        ("messages", {}, "chat is not a list of messages"),
        ("messages", {"chat": "hello"}, "chat is not a list of messages"),
        ("messages", {"chat": []}, "chat has fewer than two messages"),
        ("messages", {"chat": [{"role": "fox", "content": "a"}]}, "chat message 1 has no role"),
        ("messages", {"chat": [{"role": "user", "content": 1}]}, "chat message 1 has no text"),
        ("base", {"text": "a"}, "not tuned and knows no rows"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_asked_is_refused(predictors, task, row, reason):
    with pytest.raises(ValueError, match=reason):
        predictors[task].encode_row(row, 5)


def test_a_row_that_is_nested_without_end_is_refused(predictors):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        predictors["messages"].encode_row({"chat": [{"role": "user", "content": deep}]}, 5)
    while deep:  # freed level by level
        deep = deep[0]


@pytest.mark.parametrize(("prompt", "reason"), [("", "empty"), ("\udfff", "half a character")])
def test_a_prompt_that_cannot_be_asked_is_refused(predictors, prompt, reason):
    with pytest.raises(ValueError, match=reason):
        predictors["base"].encode_prompt(prompt)


@pytest.mark.parametrize("task", ["instructions", "messages", "base"])
def test_what_has_no_labels_does_not_classify(predictors, task):
    with pytest.raises(ValueError, match="not tuned to classify"):
        predictors[task].encode_for_labels(ROWS.get(task, [{"text": "a"}])[0])


def test_probabilities_are_the_models_own(predictors):
    """Against one plain forward pass for each pair, and a softmax over the labels."""
    predictor = predictors["classification"]
    prompts = [predictor.encode_for_labels(row).ids for row in ROWS["classification"]]
    expected = []
    for prompt in prompts:
        sums = []
        for label in LABELS:
            answer = [*predictor.encoder.encode(" " + label), predictor.encoder.eos_id]
            with torch.inference_mode():
                logits = predictor.model(input_ids=torch.tensor([prompt + answer])).logits[0]
            logp = logits.double().log_softmax(-1)
            sums.append(sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(answer)))
        expected.append(np.exp(sums) / np.exp(sums).sum())
    found = predictor.classify(prompts)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.ptp(found, axis=1).min() > 0.01  # no coin is tossed


@pytest.mark.parametrize(
    ("of_row", "text"), [(True, "a  fox é "), (False, "   a  fox é ")], ids=["row", "prompt"]
)
def test_the_space_that_an_answer_was_learned_behind_is_no_part_of_it(predictors, of_row, text):
    encoder = predictors["base"].encoder
    stream = AnswerStream(encoder, of_row)
    pieces = [stream.put(token) for token in encoder.encode("   a  fox é ")]
    assert stream.text == "".join(pieces) == text
