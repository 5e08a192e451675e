"""Tests of near-duplicates: similarities against scikit-learn, found pairs against all pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from gptj8.dataset.validation.near_duplicates import (
    band_hashes,
    banding,
    find_similar,
    normalize,
    similarity,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzäöéß漢字"


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(count)]


def related_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of 6 to 30 words; half of them are earlier texts with a few changed words."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        text = words(rng, rng.randint(6, 30))
        if texts and rng.random() < 0.5:
            text = list(rng.choice(texts))
            for _ in range(rng.randint(0, 6)):
                text[rng.randrange(len(text))] = words(rng, 1)[0]
        texts.append(text)
    return [" ".join(text) for text in texts]


def all_similarities(texts: list[str]) -> np.ndarray:
    """Return the Jaccard similarity of all pairs, computed with scikit-learn."""
    counts = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True, lowercase=False)
    shingles = counts.fit_transform(texts).astype(np.int64)
    shared = (shingles @ shingles.T).toarray()
    sizes = shared.diagonal()
    return shared / (sizes[:, None] + sizes[None, :] - shared)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("It's  GREAT,\nisn't it?!", "it s great isn t it"),
        ("RT @someone: good news https://example.org/x1", "good news"),
        ("good &amp; bad &#33;", "good bad"),
        ("STRASSE Straße", "strasse strasse"),
        ("snake_case 42", "snake case 42"),
        ("漢字、カナ", "漢字 カナ"),
        ("so good 🙂 ?!", "so good 🙂"),
        ("3 + 3 = ...", "3 + 3 ="),
        ("`x` ~ ^^ ?!", "x"),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize(text) == normal


def test_similarity_is_jaccard_similarity_of_shingles() -> None:
    texts = related_texts(60)
    expected = all_similarities(texts)
    for i in range(60):
        for j in range(60):
            assert similarity(texts[i], texts[j]) == pytest.approx(expected[i, j])
    assert similarity("ab", "ab") == 1 and similarity("ab", "cd") == 0


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_banding_finds_most_similar_pairs_and_few_others(threshold: float) -> None:
    bands, width = banding(threshold, 10_000)
    assert bands * width <= 256

    def found(s: float) -> float:
        return 1 - (1 - s**width) ** bands

    assert found(threshold) >= 0.95 and found(min(1, threshold + 0.1)) > 0.995
    assert found(threshold / 4) < 0.05


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_nearly_all_similar_pairs_are_found_and_no_others(threshold: float) -> None:
    texts = related_texts(4000, seed=1)
    matrix = band_hashes(texts, *banding(threshold, len(texts)))
    groups = np.repeat(np.array([0, 1], dtype=np.uint8), [3200, 800])
    pairs, alike = find_similar(matrix, groups, texts.__getitem__, threshold)
    expected = all_similarities(texts)
    found = {tuple(pair) for pair in pairs.tolist()}
    assert len(found) == len(pairs) and (pairs[:, 0] < pairs[:, 1]).all()
    assert alike.tolist() == pytest.approx([expected[i, j] for i, j in pairs.tolist()])
    assert (alike >= threshold).all()
    similar = np.argwhere(np.triu(expected >= threshold, 1))
    crossing = groups[similar[:, 0]] != groups[similar[:, 1]]
    leaking = set(similar[crossing, 0].tolist())
    repeating = set(similar[~crossing, 1].tolist())
    family = connected_components(graph(similar[~crossing], len(texts)), directed=False)[1]
    found_crossing = groups[pairs[:, 0]] != groups[pairs[:, 1]]
    assert len(set(pairs[found_crossing, 0].tolist()) & leaking) >= 0.95 * len(leaking) > 30
    assert len(set(pairs[~found_crossing, 1].tolist()) & repeating) >= 0.95 * len(repeating) > 200
    # The found pairs connect nearly the same families as all pairs.
    within = pairs[~found_crossing]
    ours = connected_components(graph(within, len(texts)), directed=False)[1]
    assert ours.max() - family.max() <= 0.05 * len(repeating)
    # Each text of a family is paired with the first one if they are similar.
    for number in np.unique(ours[within]):
        members = np.flatnonzero(ours == number)
        like_first = members[1:][expected[members[0], members[1:]] >= threshold]
        assert {(members[0], text) for text in like_first.tolist()} <= found


def graph(pairs: np.ndarray, size: int) -> coo_array:
    return coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))


def test_text_similar_to_two_others_joins_their_families() -> None:
    rng = random.Random(9)
    first, middle, last = ([], [], [])
    for _ in range(40):
        a, b = words(rng, 12), words(rng, 12)
        both = [*a[:9], *b[3:]]
        first.append(" ".join([*a, *b[6:]]))
        middle.append(" ".join([*a[3:], *b]))
        last.append(" ".join([*a[:2], *both, *b[:3]]))
    texts = [*first, *middle, *last]
    matrix = band_hashes(texts, *banding(0.5, len(texts)))
    groups = np.zeros(len(texts), dtype=np.uint8)
    pairs, _ = find_similar(matrix, groups, texts.__getitem__, 0.5)
    expected = np.argwhere(np.triu(all_similarities(texts) >= 0.5, 1))
    ours, theirs = (
        connected_components(graph(found, len(texts)), directed=False)[1]
        for found in (pairs, expected)
    )
    assert len(set(zip(ours, theirs, strict=True))) == ours.max() + 1 == theirs.max() + 1 < 120


class Counting:
    """Return texts by index and count the calls."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.calls = 0

    def __call__(self, index: int) -> str:
        self.calls += 1
        return self.texts[index]


def test_rows_from_one_template_are_not_compared_pairwise() -> None:
    rng = random.Random(4)
    pattern = "please translate the sentence below into plain english and say which {} it is about"
    alike = [pattern.format(" ".join(words(rng, 2))) for _ in range(2000)]
    halfway = [f"{pattern[:40]} {' '.join(words(rng, 8))}" for _ in range(2000)]
    for texts, related in ((alike, True), (halfway, False)):
        text_of = Counting(texts)
        groups = np.repeat(np.array([0, 1], dtype=np.uint8), [1500, 500])
        matrix = band_hashes(texts, *banding(0.6, 2000))
        pairs, _ = find_similar(matrix, groups, text_of, 0.6)
        assert text_of.calls < 2 * 2 * 17 * 2000  # out of four million
        crossing = groups[pairs[:, 0]] != groups[pairs[:, 1]]
        if related:
            assert len(set(pairs[~crossing, 1].tolist())) >= 1998 - 2
            assert len(set(pairs[crossing, 0].tolist())) >= 0.95 * 1500


def test_bands_are_more_selective_for_more_texts() -> None:
    widths = [banding(0.6, texts)[1] for texts in (1_000, 100_000, 1_000_000, 10_000_000)]
    assert widths == [5, 5, 6, 7]
    assert banding(0.8, 1_000) == banding(0.8, 10_000_000)  # already selective enough


def test_hashes_do_not_depend_on_other_texts() -> None:
    texts = related_texts(700, seed=2)
    together = band_hashes(texts, 36, 7)
    alone = np.concatenate([band_hashes([text], 36, 7) for text in texts[:50]], axis=1)
    assert (together[:, :50] == alone).all()
    assert band_hashes(["a"], 36, 7).shape == (36, 1)
