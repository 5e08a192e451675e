"""Normalize text for comparison: words in a Unicode normal form, and invisible characters."""

from __future__ import annotations

import unicodedata
from typing import Literal

_LONGEST_WORD = 1000

INVISIBLE = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
"""White space, as `str.strip` removes it, and zero-width characters."""


def canonical_words(text: str, form: Literal["NFC", "NFKC"]) -> list[str]:
    """Return the words of a text, split at white space, in a Unicode normal form."""
    words = text.split()
    if text.isascii():
        return words
    return [unicodedata.normalize(form, part) for word in words for part in _parts(word)]


def _parts(word: str) -> list[str]:
    """Cut very long words: normalizing a run of combining marks takes quadratic time."""
    return [word[start : start + _LONGEST_WORD] for start in range(0, len(word), _LONGEST_WORD)]
