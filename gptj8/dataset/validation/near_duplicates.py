"""Texts that are nearly the same: MinHash finds the candidates, the exact similarity decides.

Two texts are as alike as the sets of their shingles, all runs of 5 characters of their normalized
form, are in Jaccard's sense: shared over all. Normalized is: HTML entities resolved, links, user
names and `RT @name:` left out, compatible characters made equal (NFKC), case folded, only letters,
digits and symbols kept, one space between words. So case, punctuation, a retweet's frame or another
link make no difference at all, and one other word of six letters in 45 characters leaves 60 %.

Comparing all pairs is out of the question, so texts are compared that agree in one band of their
MinHash signature (Broder, "On the resemblance and containment of documents", 1997; bands: Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). The only thing that is sketched is
which pairs are looked at; no pair is reported that is not as similar as the threshold. Of pairs
just at it at least `_RECALL` are looked at, of more similar ones practically all. Among more than
some hundred thousand texts too many agree by chance, and the bands are more selective: of ten
million texts 64 % of the pairs of similarity 0.6 are looked at, 95 % of 0.7, and all of 0.8.

The signatures are rensa's, in Rust over flat arrays: 2.5 microseconds for a text of 500 characters.
datasketch, tried first, takes 530, which is an hour and a half for ten million rows.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import regex

from gptj8.dataset.text import canonical_words
from gptj8.dataset.validation.repeated_values import pack, repeated, unpack

SHINGLE = 5
_NUM_PERM = 256
_LARGEST_WIDTH = 16
_RECALL = 0.95
_SEED = 8
_CHUNK = 256  # texts whose shingles stay in the processor's cache
_TOP = np.uint64(32)

_CHANCE = 0.05  # what texts without any relation share
_MISSES = 16  # texts that one is compared with and not similar to
_COINCIDENCES = 0.1  # texts that one may be compared with by chance, a band

_NOISE = re.compile(r"\bRT\s+@\w+:?|https?://\S+|\bwww\.\S+|@\w+", re.IGNORECASE)
_NO_ENTITY = re.compile(r"&#[0-9]{8,};?")
# `3 + 3` is not `3 = 3`, nor is one emoji another: symbols count, markup and punctuation do not.
_ASCII_WORD = re.compile(r"[^\W_]+|[$+<=>|]")
# `re` takes a word apart at its accents.
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+|[$+<=>|]|(?![\x00-\x7f])\p{S}")


def normalize(text: str) -> str:
    """Return what of a text counts when it is compared with others."""
    if "&" in text:
        # No character has a number of so many digits, and Python refuses to read very many.
        text = html.unescape(_NO_ENTITY.sub(" ", text))
    text = _NOISE.sub(" ", text)
    if text.isascii():
        return " ".join(_ASCII_WORD.findall(text.casefold()))
    folded = " ".join(canonical_words(text, "NFKC")).casefold()
    return " ".join(_WORD.findall(folded))


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of the shingles of two normalized texts, 0 to 1."""
    # As hashes: sets of strings would take gigabytes for texts of some megabytes.
    a, b = (np.unique(_hashed_shingles([text])[0]) for text in (one, other))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def banding(threshold: float, texts: int) -> tuple[int, int]:
    """Return how many bands, and of how many values: the most selective that miss little.

    Two texts of similarity s agree in a band of r values with probability s**r, and in one of b
    bands with 1 - (1 - s**r)**b.

    Args:
        threshold: the similarity to find.
        texts: how many will be compared; of many, the bands are at least so selective that few
            agree by chance.
    """
    selective = math.ceil(math.log(_COINCIDENCES / max(texts, 1)) / math.log(_CHANCE))
    for width in range(_LARGEST_WIDTH, 0, -1):
        bands = _NUM_PERM // width
        if 1 - (1 - threshold**width) ** bands >= _RECALL or width <= selective:
            return bands, width
    raise ValueError(f"no banding for a threshold of {threshold}")


def expected_recall(threshold: float, texts: int) -> float:
    """Return the share of the pairs just at the threshold that are looked at, 0 to 1."""
    bands, width = banding(threshold, texts)
    return 1 - (1 - threshold**width) ** bands


def band_hashes(normalized: Sequence[str], bands: int, width: int) -> np.ndarray:
    """Return what texts have to agree in to be compared.

    Args:
        normalized: from `normalize`, none of them empty.
        bands, width: from `banding`.

    Returns:
        (bands, texts) uint32.
    """
    hashes = np.empty((bands, len(normalized)), dtype=np.uint32)
    for start in range(0, len(normalized), _CHUNK):
        chunk = normalized[start : start + _CHUNK]
        hashes[:, start : start + len(chunk)] = _band_hashes(chunk, bands, width)
    return hashes


def _band_hashes(normalized: Sequence[str], bands: int, width: int) -> np.ndarray:
    import rensa

    hashes, offsets = _hashed_shingles(normalized)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets, bands * width, _SEED
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(normalized), bands, width)
    mixed = np.zeros((len(normalized), bands), dtype=np.uint64)
    for column in range(width):
        mixed = _mix(mixed ^ digests[:, :, column])
    return (mixed >> _TOP).astype(np.uint32).T


def find_similar(
    bands: Iterable[np.ndarray],
    groups: np.ndarray,
    text_of: Callable[[int], str],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the families of similar texts, and for each text a similar one of a later group.

    A text is compared with the first one that agrees with it in a band, with the one before it, and
    with the first one of the next group; but not with one that is of its family already, nor after
    `_MISSES` that were not similar. So a million rows made from one pattern take some million
    comparisons and not half a billion.

    Args:
        bands: one (texts,) uint32 array at a time, from `band_hashes`.
        groups: (texts,) the group, such as the split, of each text; ascending.
        text_of: the normalized text of an index.
        threshold: 0 to 1.

    Returns:
        (pairs, 2) int64, distinct pairs of similar texts by index, the smaller one first; within a
        group they connect every family, and its first text with all that are like it. And (pairs,)
        their similarities.
    """
    parents = np.arange(len(groups))
    leaked = np.zeros(len(groups), dtype=bool)
    misses = np.zeros((2, len(groups)), dtype=np.uint8)
    seen = np.empty(0, dtype=np.uint64)
    similar = _SimilarPairs(text_of, threshold)
    for band in bands:
        parts = [pack(one, other) for one, other in _agreeing(band, groups)]
        if not parts:
            continue
        new = np.setdiff1d(np.unique(np.concatenate(parts)), seen, assume_unique=True)
        one, other = unpack(new)
        crossing = groups[one] != groups[other]
        waiting = np.where(
            crossing,
            ~leaked[one] & (misses[1, one] < _MISSES),
            (parents[one] != parents[other]) & (misses[0, other] < _MISSES),
        )
        seen = np.union1d(seen, new[waiting])
        pairs = (array[waiting].tolist() for array in (one, other, crossing))
        for i, j, is_crossing in zip(*pairs, strict=True):
            text = i if is_crossing else j
            known = leaked[i] if is_crossing else _root(parents, i) == _root(parents, j)
            if known or misses[int(is_crossing), text] == _MISSES:
                continue
            if not similar.compare(i, j):
                misses[int(is_crossing), text] += 1
            elif is_crossing:
                leaked[i] = True
            else:
                parents[_root(parents, j)] = _root(parents, i)
    # What is dropped for its likeness to the first of a family has to be like that one.
    within = [pair for pair in similar.found if groups[pair[0]] == groups[pair[1]]]
    first: dict[int, int] = {}
    for text in sorted({text for pair in within for text in pair}):
        start = first.setdefault(_root(parents, text), text)
        if start != text:
            similar.compare(start, text)
    pairs_found = np.array(list(similar.found), dtype=np.int64).reshape(-1, 2)
    return pairs_found, np.array(list(similar.found.values()))


class _SimilarPairs:
    """Compares texts in full and keeps the similar ones."""

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        self.found: dict[tuple[int, int], float] = {}
        self._text_of = text_of
        self._threshold = threshold

    def compare(self, one: int, other: int) -> bool:
        if (one, other) in self.found:
            return True
        alike = similarity(self._text_of(one), self._text_of(other))
        if alike >= self._threshold:
            self.found[one, other] = alike
        return alike >= self._threshold


def _root(parents: np.ndarray, text: int) -> int:
    """Return what stands for a text's family (union-find with path halving)."""
    while parents[text] != text:
        parents[text] = parents[parents[text]]
        text = int(parents[text])
    return text


def _agreeing(band: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    values, index = repeated(band)
    if not len(values):
        return
    starts = np.concatenate([[True], values[1:] != values[:-1]])
    place = np.arange(len(values))
    first = np.maximum.accumulate(np.where(starts, place, 0))
    later = np.flatnonzero(~starts)
    yield index[first[later]], index[later]
    yield index[later - 1], index[later]
    # Where the next run begins: of texts that agree and are of one group.
    group = groups[index]
    turns = starts | np.concatenate([[True], group[1:] != group[:-1]])
    run = np.cumsum(turns) - 1
    begins = np.append(np.flatnonzero(turns), len(values))
    following = begins[run + 1]
    inside = following < len(values)
    inside[inside] = first[following[inside]] == first[inside]
    earlier = np.flatnonzero(inside)
    yield index[earlier], index[following[earlier]]


def _hashed_shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all shingles, text after text, and where each text begins and ends."""
    padded = [text.ljust(SHINGLE) for text in texts]
    joined = np.frombuffer("".join(padded).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    ends = np.cumsum(lengths)
    count = len(joined) - SHINGLE + 1
    hashes = joined[:count].copy()
    for offset in range(1, SHINGLE):  # 5 code points of 21 bits do not fit: a polynomial, mixed
        hashes *= np.uint64(0x100000001B3)
        hashes ^= joined[offset : offset + count]
    whole = np.ones(len(joined), dtype=bool)
    for offset in range(1, SHINGLE):  # runs that reach into the next text are not shingles
        whole[ends - offset] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)])
    return _mix(hashes[whole[:count]]), offsets.astype(np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all (the finalizer of Stafford's variant 13 of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
