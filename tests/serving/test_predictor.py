"""Prompts of rows equal those of training, and label probabilities equal the model's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.conversations import Conversation
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.dataset.validation.conversation_rows import choose_template
from gptj8.evaluation.suite import Questions
from gptj8.params.sections import parse_params
from gptj8.serving.predictor import AnswerStream, Predictor
from tests.helpers.served_models import LABELS, TASKS, data_of

CHAT = [
    {"role": "system", "content": "be a fox"},
    {"from": "human", "value": "jump over the dog"},
]
CHAT_OF_OPENAI = [{"role": "user", "content": "jump over the dog"}]
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
    """Return the prompt ids of a row, as prepared for training."""
    data = parse_params({"data": data_of(task), "model": {"path": "m"}}).data
    shape = shape_of(data)
    cells = {field: row.get(column) for field, column in shape.columns.items()}
    if task == "messages":
        asked = shape.conversation_of(row)
        answer = {"role": "assistant", "content": "the dog"}
        template = choose_template(data, shape, TextEncoder.load(base))
        encoded = ConversationEncoder(template, data.max_length).encode(
            Conversation((*asked.messages, answer))
        )
        ((ids, spans),) = encoded.examples
        return ids[: spans[-2]]
    cells[shape.answer] = next(iter(ANSWERS[task].values()))
    table = pd.DataFrame({name: pd.array([cell], dtype="str") for name, cell in cells.items()})
    fields = shape.to_fields(table).iloc[0]
    encoder = PromptEncoder(TextEncoder.load(base), shape.prompt_template, data.max_length)
    example = encoder.example(fields[shape.input], fields[shape.answer])
    return example.ids[: example.prompt_length]


@pytest.mark.parametrize(
    ("task", "number"), [(task, n) for task in TASKS for n in range(len(ROWS[task]))]
)
def test_encode_row_equals_training_prompt(predictors, tiny_8bit_dir, task, number):
    row = ROWS[task][number]
    assert predictors[task].encode_row(row).ids == trained_prompt(task, row, tiny_8bit_dir)


def evaluated_prompts(task, tuned, rows, base):
    """Return the prompts that the evaluation asks for, from rows as the dataset has them."""
    shape, encoder = tuned.shape, TextEncoder.load(base)
    prompts = PromptEncoder(encoder, shape.prompt_template, tuned.max_length)
    settings = {"max_new_tokens": tuned.max_new_tokens}
    if task == "messages":
        answer = {"role": "assistant", "content": "the dog"}
        asked = [shape.conversation_of(row) for row in rows]
        texts = [Conversation((*each.messages, answer)).to_json() for each in asked]
        table = pd.DataFrame({"conversation": texts, "prompt": "", "completion": "the dog"})
        settings["conversations"] = tuned.conversation_encoder(encoder, tuned.max_length)
    else:
        answers = ANSWERS[task]
        cells = [{f: {**row, **answers}.get(c) for f, c in shape.columns.items()} for row in rows]
        table = shape.to_fields(pd.DataFrame(cells, dtype="str"))
    found = Questions.of_rows(shape.task, table, tuned.labels, prompts, **settings)
    return found.prompts


def rows_of_every_length(task):
    texts = ["lazy dog é " * n + "fox jumps" for n in (0, 1, 2, 3, 5, 8, 12, 20, 60)]
    if task == "messages":  # two conversations, of which the second has no room in 64 tokens
        asked = [{"role": "user", "content": text} for text in texts]
        talk = [CHAT[1], {"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
        return [{"chat": [message]} for message in asked] + [{"chat": talk}]
    names = {"classification": ["text"], "columns": ["title", "body"]}
    columns = names.get(task, ["instruction", "input"])
    return [dict.fromkeys(columns, text) for text in texts]


@pytest.mark.parametrize(("max_length", "tokens"), [(64, 64), (64, 9), (96, 64), (128, 64)])
@pytest.mark.parametrize("task", TASKS)
def test_every_row_has_its_prompt_of_the_evaluation(
    predictors, tiny_8bit_dir, task, max_length, tokens
):
    """Whatever the number of new tokens, and with any part of the row cut."""
    known = predictors[task]
    tuned = replace(known.task, max_length=max_length, max_new_tokens=tokens)
    predictor = Predictor(known.model, known.encoder, tuned, "tuned")
    rows = rows_of_every_length(task)
    encoded = [predictor.encode_row(row) for row in rows]
    assert [e.ids for e in encoded] == evaluated_prompts(task, tuned, rows, tiny_8bit_dir)
    assert encoded[0].cut_tokens == 0 < max(e.cut_tokens for e in encoded)
    room = predictor.context - max(len(e.ids) for e in encoded)
    if room > 0:
        for count in (1, room):
            assert [predictor.encode_row(row, count).ids for row in rows] == [
                e.ids for e in encoded
            ]


def test_new_tokens_beyond_the_context_are_refused(predictors):
    predictor = predictors["instructions"]
    row = {"instruction": "jump", "input": "over the dog"}
    room = predictor.context - len(predictor.encode_row(row).ids)
    predictor.encode_row(row, room)
    with pytest.raises(ValueError, match=f"with max_new_tokens = {room + 1} there is room for"):
        predictor.encode_row(row, room + 1)


def test_a_chat_is_encoded_whole_or_refused(predictors):
    predictor = predictors["messages"]
    ids, end_id = predictor.encode_chat(CHAT_OF_OPENAI)
    assert ids == predictor.encode_row({"chat": CHAT_OF_OPENAI}).ids
    assert end_id == predictor.encoder.eos_id
    long = [*CHAT_OF_OPENAI, {"role": "user", "content": "dog " * 500}]
    assert len(predictor.encode_chat(long)[0]) > 500
    for messages, reason in (([], "no messages"), ([{"role": "fox"}], "no valid role")):
        with pytest.raises(ValueError, match=reason):
            predictor.encode_chat(messages)


def test_long_row_is_truncated_in_its_text_and_reported(predictors):
    longest = max(map(len, predictors["classification"]._labels.ids))
    encoded = predictors["classification"].encode_row({"text": "lazy dog " * 80})
    assert len(encoded.ids) == 96 - longest
    assert encoded.cut_tokens > 0
    text = predictors["classification"].encoder.decode(encoded.ids)
    assert text.startswith("lazy dog")
    assert text.endswith("\n\nLabel:")


def test_special_token_names_are_encoded_as_text(predictors):
    predictor = predictors["classification"]
    encoder = predictor.encoder
    assert encoder.eos_id not in predictor.encode_prompt("a <|endoftext|> b")
    assert encoder.eos_id not in predictor.encode_row({"text": "<|endoftext|>"}, 5).ids
    assert "<|endoftext|>" in encoder.decode(predictor.encode_prompt("a <|endoftext|> b"))


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("classification", {}, "text is missing"),
        ("classification", {"TEXT": "a"}, "TEXT is not a column, did you mean text"),
        ("classification", {"text": " \n\u200b"}, "text is empty"),
        ("classification", {"text": None}, "text is empty"),
        ("classification", {"text": 7}, "text is an integer, not text"),
        ("classification", {"text": ["a"]}, "text is a list, not text"),
        ("columns", {"title": {"a": 1}}, "title is an object, not text"),
        ("columns", {"title": [{"a": 1}]}, "title is a list, not text"),
        ("columns", {"title": float("nan")}, "title is empty"),
        ("classification", {"text": "a\ud800"}, "lone surrogate"),
        ("columns", {"body": "a"}, "title is missing"),
        ("instructions", {"input": "a"}, "instruction is missing"),
        ("messages", {}, "chat is not a list of messages"),
        ("messages", {"chat": "hello"}, "chat is not a list of messages"),
        ("messages", {"chat": []}, "chat has no messages"),
        (
            "messages",
            {"chat": [{"role": "fox", "content": "a"}]},
            "chat message 1 has no valid role",
        ),
        ("messages", {"chat": [{"role": "user", "content": 1}]}, "chat message 1 has no text"),
        ("base", {"text": "a"}, "not fine-tuned and cannot answer rows"),
    ],
    ids=str,
)
def test_invalid_row_raises(predictors, task, row, reason):
    with pytest.raises(ValueError, match=reason):
        predictors[task].encode_row(row, 5)


def test_deeply_nested_row_raises(predictors):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        message = {"role": "user", "content": "a", "note": deep}
        predictors["messages"].encode_row({"chat": [message]}, 5)
    while deep:  # free it level by level to avoid deep recursion
        deep = deep[0]


@pytest.mark.parametrize(("prompt", "reason"), [("", "empty"), ("\udfff", "lone surrogate")])
def test_invalid_prompt_raises(predictors, prompt, reason):
    with pytest.raises(ValueError, match=reason):
        predictors["base"].encode_prompt(prompt)


@pytest.mark.parametrize("task", ["instructions", "messages", "base"])
def test_encode_for_labels_without_labels_raises(predictors, task):
    with pytest.raises(ValueError, match="not fine-tuned to classify"):
        predictors[task].encode_for_labels(ROWS.get(task, [{"text": "a"}])[0])


def test_classify_equals_plain_forward_passes(predictors):
    """Compare with one forward pass per prompt and label, normalized over the labels."""
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
    assert np.ptp(found, axis=1).min() > 0.01  # the probabilities are not uniform


@pytest.mark.parametrize(
    ("of_row", "answer", "text"),
    [
        (True, " a  fox é ", "a  fox é "),
        (True, "   a", "   a"),
        (True, "\n a", "\n a"),
        (False, " a", " a"),
    ],
)
def test_answer_stream_removes_only_the_space_before_an_answer(predictors, of_row, answer, text):
    encoder = predictors["base"].encoder
    stream = AnswerStream(encoder, encoder.encode("Label:"), of_row)
    pieces = [stream.put(token) for token in encoder.encode(answer)]
    assert stream.text == "".join(pieces) == text
