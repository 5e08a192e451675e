"""Few-shot examples are balanced, seeded and complete, and come from the training rows."""

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
def test_examples_are_balanced_distinct_and_from_train(train, count):
    examples = select_examples(train, LABELS, count, seed=0)
    assert len(examples) == count == len(set(examples))
    assert set(examples) <= set(zip(train["text"], train["label"], strict=True))
    shares = [Counter(label for _, label in examples)[label] for label in LABELS]
    assert max(shares) - min(shares) <= 1


def test_examples_depend_only_on_the_seed(train):
    first = select_examples(train, LABELS, 5, seed=1)
    assert first == select_examples(train.copy(), LABELS, 5, seed=1)
    assert first != select_examples(train, LABELS, 5, seed=2)


def test_fewer_rows_than_requested_examples(train):
    assert len(select_examples(train, LABELS, 1000, seed=0)) == 60
    rare = train[(train["label"] != "sql") | (train.index % 20 == 0)]
    examples = select_examples(rare, LABELS, 12, seed=0)
    assert len(examples) == 12
    assert Counter(label for _, label in examples)["sql"] == 1


def test_long_texts_are_used_last(train):
    def fits(text: str) -> bool:
        return len(text) < 8

    short = sum(map(fits, train["text"]))
    examples = select_examples(train, LABELS, short, seed=0, fits=fits)
    assert all(fits(text) for text, _ in examples)
    everything = select_examples(train, LABELS, 60, seed=0, fits=fits)
    assert len(set(everything)) == 60


def test_prompts_share_complete_examples(train, encoder):
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
    prefix = len(encoder.prefix_ids)
    joined = " ".join(map(str, shared))
    assert all(" ".join(map(str, ids[prefix:])) in joined for ids in solved)
    assert len(shared) == prefix + sum(len(ids) - prefix for ids in solved)
    assert shared.count(encoder.eos_id) == 3


def test_too_many_examples_raise(train, encoder):
    prompts = PromptEncoder(encoder, "{text}\n\nLabel:", 40)
    with pytest.raises(UserError, match=r"evaluate.few_shot = 50.*40 tokens"):
        few_shot_prompts(["fox"], train, LABELS, prompts, count=50, seed=0)
