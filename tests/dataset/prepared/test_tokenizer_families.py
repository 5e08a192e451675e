"""Ids of rows equal those of the joined text, as the tokenizers of seven families give them."""

import pickle
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from gptj8.dataset.prepared.prompts import PromptEncoder, join, without_lead
from gptj8.dataset.prepared.text_encoder import MARK, TextEncoder
from tests.helpers.tokenizer_families import FAMILIES, write_family

LABELS = ("positive", "negative", "neutral", "12", "東京")
TEXTS = (
    "The quick brown fox.",
    "  Two spaces before and after  ",
    "def add(a, b):\n    return a + b\n",
    "naïve café 東京 Москва 1234!",
)
TEMPLATES = ("{text}\n\nLabel:", "{text}\nLabel: ", "### Instruction:\n{text}\n### Response:\n")
COMPLETIONS = ("It is said.", "\n    return total\n", "  indented", "東京", "12 + 3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = write_family(request.param, tmp_path_factory.mktemp(request.param))
    return AutoTokenizer.from_pretrained(folder), TextEncoder.load(folder), folder


def joined_ids(tokenizer, text):
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels(family, template):
    tokenizer, encoder, _ = family
    prompts = PromptEncoder(encoder, template, 512)
    labels = prompts.labels(LABELS)
    for text in TEXTS:
        prompt = template.format(text=text)
        asked = prompts.prompt(text, labels.longest, labels=labels)
        assert asked.cut_tokens == 0
        for label, ids in zip(LABELS, labels.ids, strict=True):
            expected = joined_ids(tokenizer, join(prompt, label))
            example = prompts.example(text, label)
            assert example.ids == expected
            # What is scored is what is trained.
            assert asked.ids + ids == expected
            assert asked.ids == expected[: example.prompt_length]
            learned = encoder.decode(example.ids[example.prompt_length :], after=asked.ids)
            assert without_lead(learned) == label


@pytest.mark.parametrize(
    "template", ["{prompt}", *(t.replace("text", "prompt") for t in TEMPLATES)]
)
def test_completions(family, template):
    tokenizer, encoder, _ = family
    prompts = PromptEncoder(encoder, template, 512)
    for text in TEXTS:
        prompt = template.format(prompt=text)
        for completion in COMPLETIONS:
            example = prompts.example(text, completion)
            assert example.ids == joined_ids(tokenizer, join(prompt, completion))
            assert example.ids[-1] == encoder.eos_id and example.cut_tokens == 0
            learned = example.ids[example.prompt_length :]
            # All of the completion is learned, and no more than a token before it.
            answer = encoder.decode(learned, after=example.ids[: example.prompt_length])
            assert answer.endswith(completion)
            assert len(answer.removesuffix(completion).strip(" ")) <= 3


def test_few_shot_examples_follow_end_tokens(family):
    tokenizer, encoder, _ = family
    prompts = PromptEncoder(encoder, TEMPLATES[0], 512)
    shots = [("The lazy dog", "negative"), ("good bye", "positive")]
    labels = prompts.labels(LABELS)
    found = prompts.prompt("Fine", labels.longest, shots, labels)
    texts = [join(TEMPLATES[0].format(text=text), label) for text, label in shots]
    text = tokenizer.eos_token.join([*texts, TEMPLATES[0].format(text="Fine")])
    assert found.ids == tokenizer(text)["input_ids"]


def test_running_text_and_names_of_special_tokens(family):
    tokenizer, encoder, _ = family
    for text in TEXTS:
        assert [*encoder.prefix_ids, *encoder.encode(text)] == tokenizer(text)["input_ids"]
    named = f"a {tokenizer.eos_token} b"
    assert encoder.eos_id not in encoder.encode(named)
    assert named.endswith(encoder.decode(encoder.encode(named)).strip())
    marked = f"one{encoder.mark(encoder.eos_id)}two {tokenizer.eos_token[:-1]}"
    expected = tokenizer(
        f"one{tokenizer.eos_token}two {tokenizer.eos_token[:-1]}", add_special_tokens=False
    )
    assert encoder.tokenize_marked([marked])[0].ids == expected["input_ids"]


@pytest.mark.parametrize("unit", ["The quick brown fox. ", "東京", "x", "\n    a + b\n", " \n "])
def test_long_texts_are_encoded_as_a_whole(family, unit):
    tokenizer, encoder, _ = family
    text = unit * (150_000 // len(unit))
    assert [*encoder.prefix_ids, *encoder.encode(text)] == tokenizer(text)["input_ids"]
    found = encoder.tokenize([text])[0]
    assert found.ids == encoder.encode(text)
    assert list(found.ends) == sorted(found.ends) and found.ends[-1] == len(text)


def test_pickled_encoder(family):
    _, encoder, _ = family
    copy = pickle.loads(pickle.dumps(encoder))
    for name in ("prefix_ids", "eos_id", "end_ids", "token_names", "special_tokens"):
        assert getattr(copy, name) == getattr(encoder, name)
    text = f"the {encoder.mark(encoder.eos_id)} fox"
    assert copy.tokenize_marked([text])[0].ids == encoder.tokenize_marked([text])[0].ids


@pytest.mark.parametrize("name", ["llama2", "llama3"])  # one is built by transformers, one read
def test_loading_does_not_import_torch(name, tmp_path):
    encoder = TextEncoder.load(write_family(name, tmp_path))
    code = (
        "import sys; from gptj8.dataset.prepared.text_encoder import TextEncoder; "
        f"ids = TextEncoder.load({str(tmp_path)!r}).encode('the quick  fox'); "
        "assert 'torch' not in sys.modules; print(ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(encoder.encode("the quick  fox")), done.stderr


def test_a_mark_is_not_written_by_a_text(family):
    _, encoder, _ = family
    with pytest.raises(ValueError, match=r"U\+FDD0 or U\+FDD1"):
        encoder.split_names(f"a {MARK}", "\ufdd0")
