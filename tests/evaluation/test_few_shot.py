"""Few-shot examples: from the training rows, balanced, seeded, whole."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest

from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.evaluation.few_shot import few_shot_prompts, select_examples
from gptj8.runtime.errors import UserError

LABELS = ("fox", "dog", "sql")


@pytest.fixture
def train():
    rows = [
        (f"{label} {'the ' * (number % 5)}{number}", label)
        for label in LABELS
        for number in range(20)
    ]
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 12, 59, 60])
def test_balanced_distinct_and_from_train(train, count):
    examples = select_examples(train, LABELS, count, seed=0)
    assert len(examples) == count == len(set(examples))
    assert set(examples) <= set(zip(train["text"], train["label"], strict=True))
    shares = [Counter(label for _, label in examples)[label] for label in LABELS]
    assert max(shares) - min(shares) <= 1


def test_seed_decides_and_nothing_else(train):
    first = select_examples(train, LABELS, 5, seed=1)
    assert first == select_examples(train.copy(), LABELS, 5, seed=1)
    assert first != select_examples(train, LABELS, 5, seed=2)


def test_no_more_than_there_are(train):
    assert len(select_examples(train, LABELS, 1000, seed=0)) == 60
    rare = train[(train["label"] != "sql") | (train.index % 20 == 0)]
    examples = select_examples(rare, LABELS, 12, seed=0)
    assert len(examples) == 12
    assert Counter(label for _, label in examples)["sql"] == 1


def test_long_texts_only_for_want_of_others(train):
    def fits(text: str) -> bool:
        return len(text) < 8

    short = sum(map(fits, train["text"]))
    examples = select_examples(train, LABELS, short, seed=0, fits=fits)
    assert all(fits(text) for text, _ in examples)
    everything = select_examples(train, LABELS, 60, seed=0, fits=fits)
    assert len(set(everything)) == 60


def test_prompts_share_their_examples_whole(train, encoder):
    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 160)
    texts = ["the quick brown fox", "dog " * 500]
    short, long = few_shot_prompts(texts, train, LABELS, prompts, count=3, seed=0)
    reserve = max(len(prompts.completion_ids(label)) for label in LABELS)
    assert len(long) == 160 - reserve
    shared = short[: -len(prompts.prompt(texts[0], reserve).ids)]
    assert long[: len(shared)] == shared
    solved = [
        prompts.example(text, label).ids for text, label in select_examples(train, LABELS, 3, 0)
    ]
    assert sorted(map(len, solved)) and shared.count(encoder.eos_id) == 3


def test_too_many_for_the_context(train, encoder):
    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 40)
    with pytest.raises(UserError, match=r"evaluate.few_shot = 50.*40 tokens"):
        few_shot_prompts(["fox"], train, LABELS, prompts, count=50, seed=0)
