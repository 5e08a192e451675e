"""Texts as they are compared: words in a normal form, and what cannot be seen."""

from __future__ import annotations

import unicodedata
from typing import Literal

_LONGEST_WORD = 1000

INVISIBLE = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
"""What `str.strip` takes away, and what is as wide as nothing."""


def canonical_words(text: str, form: Literal["NFC", "NFKC"]) -> list[str]:
    """Return the words of a text, what stands between white space, in a Unicode normal form."""
    words = text.split()
    if text.isascii():
        return words
    return [unicodedata.normalize(form, part) for word in words for part in _parts(word)]


def _parts(word: str) -> list[str]:
    """Cut what is no word: the time that normalizing takes is quadratic in a run of accents."""
    return [word[start : start + _LONGEST_WORD] for start in range(0, len(word), _LONGEST_WORD)]
