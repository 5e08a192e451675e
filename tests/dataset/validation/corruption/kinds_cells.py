"""Kinds of damage to single cells: texts, labels, prompts and completions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.dataset.validation.corruption.damage import ALL, Damage, cell, row, text
from tests.dataset.validation.corruption.shapes import LABELS, WHOLE, Dataset, Place
from tests.dataset.validation.corruption.texts import (
    SPECIAL,
    asian,
    code,
    emoji,
    european,
    latin,
    line,
    link,
    prose,
    russian,
)


def insert(what: str, at: int) -> Callable[[str], str]:
    return lambda text: text[:at] + what + text[at:]


def append(what: str) -> Callable[[str], str]:
    return lambda text: text + what


def instead(what: Any) -> Callable[[str], Any]:
    return lambda text: what


def misread(encoding: str, times: int = 1) -> Callable[[str], str]:
    """Return a function that decodes UTF-8 with another encoding, undefined bytes as Latin-1."""

    def read(text: str) -> str:
        for _ in range(times):
            text = "".join(
                bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode()
            )
        return text

    return read


def too_long(name: str, shape: str, formats: str) -> Damage:
    """Return a kind that adds a few thousand letters to the text of each row."""

    def change(dataset: Dataset, place: Place) -> None:
        # The added text differs per row, because many rows share an instruction.
        more = line(random.Random(f"{name} {place}"), latin, 600)
        dataset.put(place, f"{dataset.text(place)} {more}")

    return row(name, shape, formats, change, "truncated", WHOLE[shape])


# Empty, blank and missing cells.
BLANK = [
    text("text-empty", "text", "csv", instead(""), "empty"),
    text("labelled-empty", "labelled", ALL, instead(""), "empty"),
    text("completion-empty", "completion", "jsonl", instead(""), "empty"),
    text("instruction-empty", "instruction", "parquet", instead(""), "empty"),
    text("whitespace", "labelled", "jsonl", instead(" \t\n  "), "empty"),
    text("no-break-space-only", "text", "csv", instead("\xa0\u202f\u3000"), "empty"),
    cell("label-empty", "labelled", "csv", "class", "", "empty"),
    cell("label-blank", "labelled", "parquet", "class", " \xa0 ", "empty"),
    cell("reply-empty", "completion", "parquet", "reply", "", "empty"),
    cell("labelled-null", "labelled", "jsonl parquet", "tweet", None, "missing"),
    cell("completion-null", "completion", "jsonl", "question", None, "missing"),
    cell("instruction-null", "instruction", "jsonl", "instruction", None, "missing"),
    cell("label-null", "labelled", "jsonl parquet", "class", None, "missing"),
    cell("output-null", "instruction", "jsonl", "output", None, "missing"),
    cell("labelled-key-absent", "labelled", "jsonl", "tweet", ..., "missing"),
    cell("completion-key-absent", "completion", "jsonl", "question", ..., "missing"),
    cell("instruction-key-absent", "instruction", "jsonl", "instruction", ..., "missing"),
    cell("label-absent", "labelled", "jsonl", "class", ..., "missing"),
    cell("output-absent", "instruction", "jsonl", "output", ..., "missing"),
]

# Cells that are not text; numbers and booleans are valid answers.
NUMBER = "is a number, not text"
LIST = "is a list, not text"
OBJECT = "is an object, not text"
TYPES = [
    cell("text-is-integer", "labelled", "jsonl", "tweet", 7, "type", "is an integer, not text"),
    cell("text-is-number", "labelled", "jsonl", "tweet", 7.5, "type", NUMBER),
    cell("text-is-boolean", "labelled", "jsonl", "tweet", True, "type", "is a boolean, not text"),
    cell("text-is-list", "labelled", "jsonl", "tweet", ["a", "b"], "type", LIST),
    cell("text-is-object", "labelled", "jsonl", "tweet", {"a": "b"}, "type", OBJECT),
    cell("label-is-list", "labelled", "jsonl", "class", ["a", "b"], "type", LIST),
    cell("completion-is-object", "completion", "jsonl", "reply", {"a": "b"}, "type", OBJECT),
    cell("input-is-list", "instruction", "jsonl", "input", [1], "type", LIST),
]

# Invalid characters. Bytes that are not UTF-8 are written as surrogates (PEP 383).
LATIN_1 = "caf\udce9"
CONTROL = "contains the control character "
CHARACTERS = [
    text("labelled-nul", "labelled", ALL, insert("\0", 9), "nul"),
    cell("label-nul", "labelled", "csv", "class", "sehr\0gut", "nul"),
    text("labelled-replacement", "labelled", ALL, insert("\ufffd", 9), "replacement"),
    cell("completion-replacement", "completion", "jsonl", "reply", "a\ufffdb", "replacement"),
    text("half-a-surrogate-pair", "labelled", "jsonl", append("\ud83d"), "replacement"),
    text("labelled-latin-1-bytes", "labelled", "csv jsonl", append(f" {LATIN_1}"), "undecodable"),
    text("instruction-latin-1-bytes", "instruction", "csv", append(f" {LATIN_1}"), "undecodable"),
    cell("label-latin-1-bytes", "labelled", "csv", "class", LATIN_1, "undecodable"),
    text("half-a-character", "completion", "jsonl", insert("\udcc3 ", 0), "undecodable"),
    text("control-bell", "labelled", ALL, insert("\x07", 5), "control", CONTROL + r"'\x07'"),
    text("control-escape", "labelled", "csv", insert("\x1b[1m", 5), "control", CONTROL + r"'\x1b'"),
    text(
        "control-delete", "labelled", "parquet", insert("\x7f", 5), "control", CONTROL + r"'\x7f'"
    ),
]

# Traces of earlier processing. Texts in other alphabets are not misread twice, because so few
# distinct characters remain that the texts become near-duplicates.
FOREIGN = (european, russian, asian, emoji)
ENTITY = "contains the HTML entity "
TRACES = [
    text("mojibake-latin-1", "labelled", ALL, misread("latin-1"), "mojibake", flavours=FOREIGN),
    text("mojibake-cp1252", "labelled", "csv", misread("cp1252"), "mojibake", flavours=FOREIGN),
    text(
        "mojibake-cp1252-twice",
        "labelled",
        "jsonl",
        misread("cp1252", times=2),
        "mojibake",
        flavours=(european, emoji),
    ),
    text("mojibake-cp1251", "text", "parquet", misread("cp1251"), "mojibake", flavours=(russian,)),
    text(
        "mojibake-one-character",
        "completion",
        "csv",
        append(" naÃ¯ve cafÃ©s"),
        "mojibake",
        flavours=(prose, code, link),
    ),
    text("mojibake-quotes", "text", "csv", append(" itâ€™s"), "mojibake", flavours=(prose, link)),
    cell(
        "mojibake-completion",
        "completion",
        "csv",
        "reply",
        misread("cp1252")("Ça été, là"),
        "mojibake",
    ),
    text("html-named", "labelled", "csv", insert("&quot;", 20), "html", ENTITY + "&quot;"),
    text("html-decimal", "labelled", "jsonl", insert("&#8217;", 20), "html", ENTITY + "&#8217;"),
    text(
        "html-hexadecimal",
        "labelled",
        "parquet",
        insert("&#x2019;", 20),
        "html",
        ENTITY + "&#x2019;",
    ),
    text("html-twice", "labelled", "csv", insert("&amp;lt;", 20), "html", ENTITY + "&amp;"),
    cell("html-completion", "completion", "csv", "reply", "Tom &amp; Li", "html", ENTITY + "&amp;"),
    text("text-special-token", "text", "parquet", insert(SPECIAL, 8), "special_token"),
    text("labelled-special-token", "labelled", "csv", insert(SPECIAL, 8), "special_token"),
    text(
        "instruction-special-token", "instruction", "parquet", insert(SPECIAL, 8), "special_token"
    ),
    cell(
        "completion-special-token",
        "completion",
        "parquet",
        "reply",
        f"yes{SPECIAL}",
        "special_token",
    ),
]

# Answers that leave no room for the text, and texts that are too long.
LONG = "x" * 2100
NO_ROOM = "leaves no room for prompt within data.max_length = 2048"
ROOM = [
    cell("completion-too-long", "completion", "csv", "reply", LONG, "room", NO_ROOM),
    cell("output-too-long", "instruction", "jsonl", "output", LONG, "room", NO_ROOM),
    cell("label-too-long", "labelled", "jsonl", "class", LONG, "room", "leaves no room for text"),
    too_long("labelled-truncated", "labelled", "csv"),
    too_long("completion-truncated", "completion", "jsonl"),
    too_long("instruction-truncated", "instruction", "parquet"),
    cell(
        "label-not-in-data.labels",
        "labelled",
        "csv",
        "class",
        "prima",
        "unknown_label",
        params={"labels": LABELS},
    ),
]

CELLS = [*BLANK, *TYPES, *CHARACTERS, *TRACES, *ROOM]
