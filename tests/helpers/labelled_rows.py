"""Distinct labelled texts, and a byte tokenizer, which makes token counts easy to predict."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "red green blue cyan lime teal navy gold pink gray plum rust sand snow mint".split()


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return distinct texts of eight words."""
    shuffled = random.Random(seed)
    return [f"{i} {' '.join(shuffled.choices(WORDS, k=8))}" for i in range(count)]


def pairs(count: int, labels: Sequence[str] = ("ham", "spam"), seed: int = 0) -> list[list[str]]:
    return [[text, labels[i % len(labels)]] for i, text in enumerate(sentences(count, seed))]


def write_csv(path: Path, rows: list, header: Sequence[str] = ("text", "label")) -> str:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return str(path)
