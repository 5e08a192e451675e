"""Tests of prompts: answers are never cut, and text never becomes special tokens."""

import json

import pytest
from transformers import AutoTokenizer

from gptj8.dataset.prepared.prompts import PromptEncoder, _share_room, check_context
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.runtime.errors import UserError

TEMPLATE = "{text}\n\nLabel:"


@pytest.fixture(scope="module")
def encoder(tiny_model_dir):
    return TextEncoder.load(tiny_model_dir)


def test_ids_equal_those_of_transformers(encoder, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "the quick brown fox\njumps over 12 zebras, naïvely"
    assert encoder.encode(text) == tokenizer(text)["input_ids"]
    assert encoder.encode_batch([text, "a"]) == [encoder.encode(text), encoder.encode("a")]
    assert encoder.decode(encoder.encode(text)) == text


def test_special_tokens_in_text_are_encoded_as_text(encoder):
    ids = encoder.encode("the fox <|endoftext|> a dog")
    assert encoder.eos_id not in ids
    assert encoder.decode(ids) == "the fox <|endoftext|> a dog"


def test_short_prompt_is_not_cut(encoder):
    prompts = PromptEncoder(encoder, TEMPLATE, 64)
    example = prompts.example("the quick fox", "lazy dog")
    assert encoder.decode(example.ids[: example.prompt_length]) == "the quick fox\n\nLabel:"
    assert encoder.decode(example.ids[example.prompt_length :]) == " lazy dog"
    assert example.ids[-1] == encoder.eos_id
    assert example.cut_tokens == 0


@pytest.mark.parametrize("max_length", [16, 24, 40])
def test_long_text_is_cut_but_not_its_completion(encoder, max_length):
    prompts = PromptEncoder(encoder, TEMPLATE, max_length)
    text = " the quick brown fox jumps" * 40
    example = prompts.example(text, "lazy dog")
    assert len(example.ids) == max_length
    assert example.ids[example.prompt_length :] == prompts.completion_ids("lazy dog")
    assert encoder.decode(example.ids[: example.prompt_length]).endswith("\n\nLabel:")
    kept = max_length - len(prompts.completion_ids("lazy dog")) - len(encoder.encode("\n\nLabel:"))
    assert example.cut_tokens == len(encoder.encode(text)) - kept


def test_few_shot_examples_share_the_available_tokens(encoder):
    prompts = PromptEncoder(encoder, TEMPLATE, 100)
    shots = [("the fox " * 30, "dog"), ("a box", "jugs")]
    prompt = prompts.prompt("seven wizards " * 30, reserve=10, examples=shots)
    assert len(prompt.ids) == 90
    decoded = encoder.decode(prompt.ids)
    assert decoded.count("Label:") == 3
    assert "a box\n\nLabel: jugs" in decoded
    assert decoded.endswith("Label:")
    assert prompt.cut_tokens > 0


def test_no_room_for_the_text_raises(encoder):
    with pytest.raises(UserError, match=r"data\.max_length = 8 leaves no room"):
        PromptEncoder(encoder, TEMPLATE, 8).example("the fox", "seven wizards box")


def test_escaped_braces_in_template(encoder):
    prompts = PromptEncoder(encoder, '{{"a": "{text}"}}', 64)
    assert (prompts.before, prompts.after) == ('{"a": "', '"}')


@pytest.mark.parametrize(
    ("lengths", "room", "shares"),
    [
        ([5, 5], 20, [5, 5]),
        ([50, 50], 20, [10, 10]),
        ([2, 50], 20, [2, 18]),
        ([50, 2, 9], 20, [9, 2, 9]),
    ],
)
def test_tokens_are_shared_evenly(lengths, room, shares):
    assert _share_room(lengths, room) == shares


def test_tokenizer_larger_than_the_embedding_raises(tiny_model_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(UserError, match="embedding has 100 rows"):
        TextEncoder.load(tmp_path)


def test_length_beyond_the_positions_of_the_model_raises(tiny_model_dir):
    check_context(tiny_model_dir, 128)
    with pytest.raises(UserError, match=r"data\.max_length = 129 exceeds the 128 positions"):
        check_context(tiny_model_dir, 129)


def test_directory_without_tokenizer_raises(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    with pytest.raises(UserError, match="has no tokenizer: no tokenizer"):
        TextEncoder.load(tmp_path)


def test_damaged_tokenizer_raises(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        TextEncoder.load(tmp_path)


def test_text_is_cut_at_its_end(encoder):
    text = " the quick brown fox jumps over a lazy dog" * 20
    ids = encoder.encode(text)
    prompts = PromptEncoder(encoder, "{text} =", 40)
    example = prompts.example(text, "fox")
    kept = len(ids) - example.cut_tokens
    assert 0 < kept < 40
    assert example.ids[:kept] == ids[:kept] and len(example.ids) == 40
    assert (
        prompts.prompt(text, reserve=len(example.ids) - example.prompt_length).ids
        == (example.ids[: example.prompt_length])
    )
