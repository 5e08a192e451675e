"""Valid files in every text format, generated from a seed, and ways to damage them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LINE_ENDS = ("\n", "\r\n", "\r")
DQ = '"'

Damage = Callable[[bytes, random.Random], bytes]


def random_rows(rng: random.Random, lines: bool = True, count: int = 24) -> list[dict[str, str]]:
    """Return rows with distinct texts that need quoting in CSV; with `lines` some have newlines."""
    letters = LETTERS + "äßéжд語😀"
    rows = []
    for number in range(count):
        words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(8)]
        glue = rng.choice([" ", ", ", '" "', "\t"] + [" ", "\n", "\r\n"] * lines)
        rows.append({"text": f"{number} {glue.join(words)}", "label": ("ham", "spam")[number % 2]})
    return rows


def delimited(rows: list[list[str]], delimiter: str, end: str, rng: random.Random) -> str:
    """Return rows as RFC 4180 text, with quotes where needed and sometimes where not needed."""
    special = re.compile(f'[{delimiter}"\r\n]')
    lines = []
    for row in rows:
        cells = [
            f'"{cell.replace(DQ, DQ * 2)}"' if special.search(cell) or rng.random() < 0.2 else cell
            for cell in row
        ]
        lines.append(delimiter.join(cells))
    return end.join(lines) + rng.choice([end, ""])


def good_file(suffix: str, rng: random.Random, rows: list[dict[str, str]]) -> bytes:
    end = rng.choice(LINE_ENDS)
    if suffix in (".csv", ".tsv"):
        cells = [["text", "label"], *(list(row.values()) for row in rows)]
        return delimited(cells, "," if suffix == ".csv" else "\t", end, rng).encode()
    if suffix == ".txt":
        return end.join(row["text"] for row in rows).encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=10)
        return sink.getvalue()
    ascii_only = rng.random() < 0.5
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice([None, 1])).encode()
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows).encode()


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pa.compress(data, "zstd", asbytes=True)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return pack[suffix](data)


# --- damage --------------------------------------------------------------------------------------


def at_random(pieces: list[bytes]) -> Damage:
    """Insert random pieces at up to three random places."""

    def damage(data: bytes, rng: random.Random) -> bytes:
        for _ in range(rng.randint(1, 3)):
            place = rng.randint(0, len(data))
            data = data[:place] + rng.choice(pieces) + data[place:]
        return data

    return damage


def swap(old: bytes, new: bytes) -> Damage:
    """Replace some occurrences of `old`."""

    def damage(data: bytes, rng: random.Random) -> bytes:
        share = rng.choice([0.05, 0.5, 1])
        return re.sub(re.escape(old), lambda m: new if rng.random() < share else old, data)

    return damage


def lines_changed(change: Callable[[list[bytes], int], object]) -> Damage:
    def damage(data: bytes, rng: random.Random) -> bytes:
        lines = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", data)
        change(lines, rng.randrange(len(lines)))
        return b"".join(lines)

    return damage


def flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def one_row(data: bytes, rng: random.Random) -> bytes:
    return b"\n".join(data.splitlines()[: 1 + data.startswith(b"text")])


def encoded(encoding: str) -> Damage:
    return lambda data, rng: data.decode().encode(encoding, "replace")


ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252")
SWAPS = [
    *((b'"', b""), (b'"', b'""'), (b'"', b"'"), (b'"', "”".encode())),
    *((b",", b";"), (b",", b" , "), (b",", b"\t"), (b"\t", b" "), (b" ", b"\xc2\xa0")),
    *((b"\n", b"\r"), (b"\n", b"\r\n"), (b"\n", b"\r\r\n"), (b"\n", b""), (b"\r", b"\n")),
    *(("ä".encode(), b"\xe4"), ("ß".encode(), b"\x80"), ("é".encode(), "é".encode() * 2)),
    *((b'"ham"', b"NaN"), (b'"spam"', b"1e999"), (b'"ham"', b"null"), (b'"spam"', b'{"a": []}')),
    *((b'"label"', b'"text"'), (b"label", b"text"), (b"label", b""), (b"label", b" label\n")),
]
PIECES = {
    "cells": [b",x", b"\tx", b',"text": "x"', b",,,,"],
    "quotes": [b'"', b'""', b'"""', b"'", b'\\"'],
    "bytes": [bytes([value]) for value in range(256)],
    "BOMs": [b"\xef\xbb\xbf", b"\xff\xfe"],
    "NULs": [b"\0", b"\0\0\0\0", b"\0" * 4096],
    "controls": [b"\x0b", b"\x0c", b"\x1c", b"\x1e", b"\x1a", b"\x85", b"\x7f"],
    "separators": ["\u2028".encode(), "\u2029".encode(), "\u0085".encode(), "\ufffd".encode()],
    "surrogates": [rb"\ud83d", rb"\udc80", rb"\ud800\ud800", b"\xed\xa0\x80"],
    "backslashes": [b"\\", b"\\u12", b"\\x"],
    "digits": [b"9" * 5000, b": " + b"9" * 5000],
    "entities": [b"&amp;", b"&#0;", b"&#xD800;", b"&#1114112;", b"&#" + b"9" * 400],
    "nesting": [b"[" * 3000, b'{"a":' * 3000, b"[" * 400 + b"]" * 400],
}
DAMAGES: dict[str, Damage] = {
    "none": lambda data, rng: data,
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "beginning lost": lambda data, rng: data[rng.randrange(len(data)) :],
    "bits flipped": flip,
    "line removed": lines_changed(lambda lines, i: lines.pop(i)),
    "line doubled": lines_changed(lambda lines, i: lines.insert(i, lines[i])),
    "lines merged": lines_changed(lambda lines, i: lines.insert(i, lines.pop(i).rstrip())),
    "line moved": lines_changed(lambda lines, i: lines.append(lines.pop(i))),
    "line cut": lines_changed(lambda lines, i: lines.insert(i, lines.pop(i)[:3] + b"\n")),
    "line blank": lines_changed(lambda lines, i: lines.insert(i, b" \t \n")),
    "line of another": lines_changed(lambda lines, i: lines.insert(i, b'{"a": 1}, "b"\n')),
    "first line only": lambda data, rng: data.splitlines(keepends=True)[0],
    "one row": one_row,
    "zero bytes": lambda data, rng: b"",
    "BOM only": lambda data, rng: b"\xef\xbb\xbf",
    "blank": lambda data, rng: bytes(rng.choices(b" \t\n\r\x0b\x0c", k=rng.randint(1, 99))),
    "twice": lambda data, rng: data + data,
    "noise": lambda data, rng: rng.randbytes(rng.randint(1, 3000)),
    "UTF-8 twice": lambda data, rng: data.decode("latin-1").encode(),
    **{name: encoded(name) for name in ENCODINGS},
    **{name: at_random(pieces) for name, pieces in PIECES.items()},
    **{ascii(f"{old!r} to {new!r}"): swap(old, new) for old, new in SWAPS},
}
