"""Tests that planted leaks among many texts are found, with few false positives."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.validation import CORPORA, EDITS, Words, corpus, find_leaks, similar_pairs
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.near_duplicates import normalize, similarity


@pytest.fixture(scope="module", params=["tweets", "paragraphs"])
def leak_corpus(request: pytest.FixtureRequest) -> tuple[Words, list[str]]:
    words = Words()
    return words, corpus(CORPORA[request.param], words, 2000)


def test_similar_pairs_match_brute_force() -> None:
    words, rng = Words(), np.random.default_rng(1)
    texts = [CORPORA["instructions"](words, rng) for _ in range(120)]
    texts += [EDITS[edit](text, words, rng) for text in texts[:20] for edit in EDITS]
    normalized = [normalize(text) for text in texts]
    alike = {
        (one, other): similarity(normalized[one], normalized[other])
        for one, other in itertools.combinations(range(len(texts)), 2)
    }
    for threshold in (0.4, 0.7):
        by_hand = {pair for pair, found in alike.items() if found >= threshold}
        assert set(map(tuple, similar_pairs(texts, threshold).tolist())) == by_hand


@pytest.mark.parametrize("rate", [0.01, 0.06])
@pytest.mark.parametrize("edit", EDITS)
def test_planted_leaks_are_found(
    leak_corpus: tuple[Words, list[str]],
    edit: str,
    rate: float,
    tmp_path: Path,
    encoder: TextEncoder,
) -> None:
    words, texts = leak_corpus
    found = find_leaks(texts, round(rate * 500), edit, words, encoder, tmp_path)
    assert found.recall >= (0.99 if edit == "none" else 0.95), found
    assert found.precision >= 0.99, found
