"""Find near-duplicate texts: MinHash selects candidate pairs, the exact similarity decides.

The similarity of two texts is the Jaccard similarity of their shingles: all runs of 5 characters
of the normalized text. Normalization resolves HTML entities, removes links, user names and
`RT @name:`, applies NFKC, folds case, keeps only letters, digits and symbols, and puts one space
between words. Case, punctuation, retweet prefixes and links therefore make no difference. Replacing
one word of six letters in a text of 45 characters leaves a similarity of 0.6.

Comparing all pairs is too slow, so two texts are compared only if they agree in at least one band
of their MinHash signatures (Broder, "On the resemblance and containment of documents", 1997; bands:
Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). Only the selection of
pairs is approximate: every reported pair has at least the similarity of the threshold. At least
`_RECALL` of the pairs at the threshold are compared, and practically all of the more similar pairs.
Above a few hundred thousand texts, too many agree by chance, so the bands are more selective. With
ten million texts, 64% of the pairs of similarity 0.6 are compared, 95% of 0.7, and all of 0.8.

The signatures are computed by rensa, in Rust over flat arrays, in 2.5 microseconds for a text of
500 characters. Alternative considered: datasketch; it was rejected because it takes 530
microseconds, which is an hour and a half for ten million rows.
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
_CHUNK = 256  # texts per call, so that the shingles fit into the CPU cache
_TOP = np.uint64(32)

_CHANCE = 0.05  # similarity of unrelated texts
_MISSES = 16  # dissimilar comparisons after which a text is no longer compared
_COINCIDENCES = 0.1  # expected comparisons by chance, per text and band

_NOISE = re.compile(r"\bRT\s+@\w+:?|https?://\S+|\bwww\.\S+|@\w+", re.IGNORECASE)
_NO_ENTITY = re.compile(r"&#[0-9]{8,};?")
# Symbols are kept, because `3 + 3` differs from `3 = 3`, and so do emojis. Markup and punctuation
# are removed.
_ASCII_WORD = re.compile(r"[^\W_]+|[$+<=>|]")
# `re` splits words at combining accents.
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+|[$+<=>|]|(?![\x00-\x7f])\p{S}")


def normalize(text: str) -> str:
    """Return the normalized form of a text, by which it is compared with others."""
    if "&" in text:
        # No code point has this many digits, and Python limits the digits that it converts.
        text = html.unescape(_NO_ENTITY.sub(" ", text))
    text = _NOISE.sub(" ", text)
    if text.isascii():
        return " ".join(_ASCII_WORD.findall(text.casefold()))
    folded = " ".join(canonical_words(text, "NFKC")).casefold()
    return " ".join(_WORD.findall(folded))


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of the shingles of two normalized texts, 0 to 1."""
    # Hashes are compared because sets of strings take gigabytes for texts of a few megabytes.
    a, b = (np.unique(_hashed_shingles([text])[0]) for text in (one, other))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def banding(threshold: float, texts: int) -> tuple[int, int]:
    """Return the number of bands and of values per band: the most selective with enough recall.

    Two texts of similarity s agree in a band of r values with probability s**r, and in at least one
    of b bands with probability 1 - (1 - s**r)**b.

    Args:
        threshold: the similarity to find.
        texts: the number of texts. With many texts, more selective bands are used, so that few
            texts agree by chance.
    """
    selective = math.ceil(math.log(_COINCIDENCES / max(texts, 1)) / math.log(_CHANCE))
    for width in range(_LARGEST_WIDTH, 0, -1):
        bands = _NUM_PERM // width
        if 1 - (1 - threshold**width) ** bands >= _RECALL or width <= selective:
            return bands, width
    raise ValueError(f"no banding for a threshold of {threshold}")


def expected_recall(threshold: float, texts: int) -> float:
    """Return the share of the pairs at the threshold that are compared, 0 to 1."""
    bands, width = banding(threshold, texts)
    return 1 - (1 - threshold**width) ** bands


def band_hashes(normalized: Sequence[str], bands: int, width: int) -> np.ndarray:
    """Return hashes of the bands; texts are compared if they agree in one of them.

    Args:
        normalized: texts from `normalize`; none may be empty.
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
    """Find the families of similar texts, and for each text a similar one in a later group.

    Among the texts that agree in a band, each text is compared with the first one, with the
    previous one, and with the first one of the next group. It is not compared with texts that are
    already in its family, nor after `_MISSES` dissimilar comparisons. A million rows made from one
    template therefore take about a million comparisons instead of half a billion.

    Args:
        bands: yields one (texts,) uint32 array per band, the rows of `band_hashes`.
        groups: (texts,) the group of each text, such as its split; ascending.
        text_of: returns the normalized text of an index.
        threshold: 0 to 1.

    Returns:
        Distinct pairs of similar texts, (pairs, 2) int64 indices with the smaller one first, and
        their similarities, (pairs,). Within a group, the pairs connect each family, and include all
        pairs of its first text with a similar member.
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
    # A text that is dropped in favor of the first of its family must be similar to that text.
    within = [pair for pair in similar.found if groups[pair[0]] == groups[pair[1]]]
    first: dict[int, int] = {}
    for text in sorted({text for pair in within for text in pair}):
        start = first.setdefault(_root(parents, text), text)
        if start != text:
            similar.compare(start, text)
    pairs_found = np.array(list(similar.found), dtype=np.int64).reshape(-1, 2)
    return pairs_found, np.array(list(similar.found.values()))


class _SimilarPairs:
    """Compute similarities of pairs and keep the similar pairs."""

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
    """Return the root of a text's cluster (union-find with path halving)."""
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
    # A run is a sequence of texts that agree and are in one group. Find where the next run begins.
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
    """Return the hashes of all shingles, text after text, and the offset of each text."""
    padded = [text.ljust(SHINGLE) for text in texts]
    joined = np.frombuffer("".join(padded).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    ends = np.cumsum(lengths)
    count = len(joined) - SHINGLE + 1
    hashes = joined[:count].copy()
    for offset in range(1, SHINGLE):  # 5 code points of 21 bits exceed 64 bits: hash them
        hashes *= np.uint64(0x100000001B3)
        hashes ^= joined[offset : offset + count]
    complete = np.ones(len(joined), dtype=bool)
    for offset in range(1, SHINGLE):  # runs that reach into the next text are not shingles
        complete[ends - offset] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)])
    return _mix(hashes[complete[:count]]), offsets.astype(np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of each value (Stafford's variant 13 of the MurmurHash3 finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
