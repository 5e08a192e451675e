"""Kinds of damage to single lines of a file, and files that are unusable."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import NamedTuple

from tests.dataset.validation.corruption.damage import Damage, row
from tests.dataset.validation.corruption.shapes import Dataset, Place, as_line

Spell = Callable[[bytes], bytes]


def raw(name: str, suffix: str, spell: Spell, reason: str) -> Damage:
    """Return a kind that rewrites the line of each row."""

    def change(dataset: Dataset, place: Place) -> None:
        dataset.raw[place] = spell(as_line(dataset.row(place), f".{suffix}"))

    return row(name, "labelled", suffix, change, "malformed", "", reason)


def instead(content: bytes) -> Spell:
    return lambda _: content


HUGE = b'{"tweet": ' + b"9" * 5000 + b"}\n"
DEEP = b"[" * 200_000 + b"\n"
INVALID = "is not valid JSON: "

LINES = [
    raw("csv-cell-too-few", "csv", instead(b"only one cell\r\n"), "has 1 cell on line"),
    raw(
        "csv-cell-too-many", "csv", instead(b"a text, unquoted,sehr gut\r\n"), "has 3 cells on line"
    ),
    raw("json-cut-off", "jsonl", lambda line: line[:20] + b"\n", INVALID),
    raw("json-single-quotes", "jsonl", instead(b"{'tweet': 'a'}\n"), INVALID),
    raw("json-two-in-a-line", "jsonl", lambda line: line.strip() + line, INVALID + "Extra data"),
    raw("json-raw-control", "jsonl", instead(b'{"tweet": "a\x01"}\n'), INVALID + "Invalid"),
    raw("json-list-line", "jsonl", instead(b'["a", "sehr gut"]\n'), "is not a JSON object"),
    raw("json-huge-number", "jsonl", instead(HUGE), "is not usable JSON"),
    raw("json-deep", "jsonl", instead(DEEP), "is not usable JSON"),
]


class Unusable(NamedTuple):
    """An unusable file: the damage to a clean file, and the expected message."""

    suffix: str
    damage: Spell
    message: str


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


UNUSABLE = {
    "quote-never-closed": Unusable(".csv", lambda c: c + b'"never closed,x\r\n', "never closed"),
    "quote-inside": Unusable(
        ".csv", lambda c: c + b'"said "hi" to",x\r\n', "text follows a closing quote"
    ),
    "no-such-column": Unusable(
        ".csv", lambda c: c.replace(b"tweet", b"twit", 1), "has no column tweet"
    ),
    "unknown-delimiter": Unusable(
        ".csv", instead(b"tweet%class\r\na%b\r\n"), "not separated by commas"
    ),
    "column-twice": Unusable(
        ".csv", lambda c: c.replace(b"class", b"tweet", 1), "repeated column names"
    ),
    "utf-16": Unusable(
        ".csv", lambda c: c.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"
    ),
    "empty": Unusable(".csv", instead(b""), "is empty"),
    "header-only": Unusable(".csv", instead(b"tweet,class\r\n"), "has no rows"),
    "array-cut-off": Unusable(
        ".json", lambda c: b"[" + c.splitlines()[0] + b",", "is not valid JSON"
    ),
    "indented-objects": Unusable(
        ".jsonl", instead(b'{\n "tweet": "a"\n}\n' * 2), "one object per line"
    ),
    "gzip-cut-off": Unusable(".csv.gz", lambda c: cut(gzip.compress(c)), "cannot be decompressed"),
    "not-gzip": Unusable(".csv.gz", lambda c: c, "cannot be decompressed"),
    "not-parquet": Unusable(".parquet", lambda c: c, "is not a Parquet file"),
}
