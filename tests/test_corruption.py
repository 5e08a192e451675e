"""Every kind of damage is found where it was done, and nothing is found where none was.

Clean datasets of each shape are written in each format; then one kind of damage at a time is done
to rows that a seed chooses. What is found must be exactly what was done.
"""

# The texts of other alphabets are meant to look like what they look like.
# ruff: noqa: RUF001

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import random
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2_contingency, ks_2samp

from benchmarks.validation import CORPORA, EDITS, Words, corpus, find_leaks, similar_pairs
from gptj8.checks import CHECKS, Kind
from gptj8.dataset import FIELDS, SPLITS
from gptj8.errors import UserError
from gptj8.near_duplicates import normalize, similarity
from gptj8.params import Data
from gptj8.prompts import TextEncoder
from gptj8.shifts import label_shift, length_shift
from gptj8.validation import Validated, validate
from tests.test_validation import byte_tokenizer

SIZES = {"train": 60, "validation": 24, "test": 24}
LABELS = ("sehr gut", "mauvais, hélas", "ни то ни сё")
SPECIAL = "<|endoftext|>"
INSTRUCTIONS = (
    "Fasse den Text zusammen.",
    "Translate into French, s'il te plaît:",
    "Which numbers are in it? Answer as JSON: {}",
    "Continue.",
)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([SPECIAL])
    return TextEncoder(tokenizer, eos_id=0)


# --- clean datasets ------------------------------------------------------------------------------


def latin(chosen: random.Random) -> str:
    return "".join(
        chosen.choice("bdfgklmnprstv") + chosen.choice("aeiou") for _ in range(chosen.randint(1, 4))
    )


def accented(chosen: random.Random) -> str:
    return latin(chosen) + chosen.choice(["é", "ü", "ñ", "ö", "ç", "ê", "ø", "å", "ï", "ß", "ž"])


def cyrillic(chosen: random.Random) -> str:
    return "".join(chosen.choice("бвдклмнпрст") + chosen.choice("аеиоуя") for _ in range(3))


def chinese(chosen: random.Random) -> str:
    return "".join(chr(0x4E00 + chosen.randrange(0x3000)) for _ in range(4))


def kana(chosen: random.Random) -> str:
    return "".join(chr(0x3042 + chosen.randrange(70)) for _ in range(5))


def line(chosen: random.Random, word: Callable[[random.Random], str], count: int) -> str:
    words = [word(chosen) for _ in range(count)]
    words[count // 2] += ","
    return " ".join(words).capitalize() + chosen.choice([".", "!", "?"])


def prose(chosen: random.Random) -> str:
    return f"{line(chosen, latin, 12)} {line(chosen, latin, 9)}"


def european(chosen: random.Random) -> str:
    return f"«{line(chosen, accented, 10)}» – {line(chosen, accented, 8)} 25 °C, 7 €, ½"


def russian(chosen: random.Random) -> str:
    return f"{line(chosen, cyrillic, 12)} {line(chosen, cyrillic, 9)}"


def asian(chosen: random.Random) -> str:
    parts = [chinese(chosen) + kana(chosen) for _ in range(9)]
    return f"{'、'.join(parts)}。「{chinese(chosen)}」{chosen.randint(1, 9999)}円"


def emoji(chosen: random.Random) -> str:
    faces = ["😀", "👩‍🔬", "🇫🇷", "❤️", "👍🏽"]
    return f"{line(chosen, latin, 12)} {chosen.choice(faces)} {line(chosen, latin, 8)} 🎉🎉"


def code(chosen: random.Random) -> str:
    a, b, c, d, e = (latin(chosen) + latin(chosen) for _ in range(5))
    return (
        f'def {a}({b}, *{c}):\n\tif {b} < {chosen.randint(2, 99)} && "{d}" not in {c}:\n'
        f'        return {{\'{e}\': f"{{{b}!r}}", "{d}\\n": [{chosen.random():.6f}]}}\n'
        f"# {line(chosen, latin, 7)}"
    )


def link(chosen: random.Random) -> str:
    a, b, c = (latin(chosen) for _ in range(3))
    number = chosen.randint(1, 99999)
    url = f"https://{a}.example/{b}?{c}={number}&amp={number + 1}&q=R%26D#{a}"
    return f"{line(chosen, latin, 9)} {url} {line(chosen, latin, 9)} AT&T @{b}_{c} #{c}"


def numbers(chosen: random.Random) -> str:
    found = [f"{chosen.uniform(-1e6, 1e6):,.3f}" for _ in range(12)]
    return f"{latin(chosen)}: {'; '.join(found)} | {chosen.randint(1, 28)}.11.2026 ± 5 %"


FLAVOURS = (prose, european, russian, asian, emoji, code, link, numbers)


def text_of(index: int, seed: int) -> str:
    return FLAVOURS[index % len(FLAVOURS)](random.Random(f"{seed} {index}"))


@dataclass
class Dataset:
    """Rows by split, and lines to write as they are in place of some of them."""

    shape: str
    rows: dict[str, list[dict[str, Any]]]
    raw: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def row(self, place: tuple[str, int]) -> dict[str, Any]:
        """Return a row by its split and its number, which counts from 1."""
        return self.rows[place[0]][place[1] - 1]

    def copy(self, source: tuple[str, int], target: tuple[str, int]) -> dict[str, Any]:
        """Put a copy of a row in the place of another one, and return it."""
        found = json.loads(json.dumps(self.row(source)))
        self.rows[target[0]][target[1] - 1] = found
        return found

    def text(self, place: tuple[str, int]) -> str:
        """Return what is damaged in a row: its text."""
        return SHAPES[self.shape].get(self.row(place))

    def put(self, place: tuple[str, int], text: str) -> None:
        """Set what is damaged in a row."""
        SHAPES[self.shape].put(self.row(place), text)

    def write(self, folder: Path, suffix: str) -> dict[str, str]:
        """Write a file a split; return their paths."""
        paths = {}
        for split, rows in self.rows.items():
            path = folder / f"{split}{suffix}"
            if suffix == ".parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
            else:
                lines = [
                    self.raw.get((split, number), as_line(row, suffix))
                    for number, row in enumerate(rows, 1)
                ]
                header = [csv_line(list(rows[0]))] if suffix == ".csv" else []
                path.write_bytes(b"".join([*header, *lines]))
            paths[split] = str(path)
        return paths


def csv_line(cells: Sequence[object]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerow(cells)
    return stream.getvalue().encode("utf-8", "surrogateescape")


def as_line(row: dict[str, Any], suffix: str) -> bytes:
    if suffix == ".csv":
        return csv_line(list(row.values()))
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can spell
        return (json.dumps(row) + "\n").encode()


@dataclass(frozen=True)
class ShapeCase:
    """A shape: the params that say so, its clean rows, and which part of a row is damaged.

    Attributes:
        column: what findings in the text are said to be in.
        answer: the same of the answer.
    """

    params: dict[str, Any]
    make: Callable[[int, int], dict[str, Any]]
    get: Callable[[dict[str, Any]], str]
    put: Callable[[dict[str, Any], str], None]
    column: str
    answer: str
    formats: tuple[str, ...] = (".csv", ".jsonl", ".parquet")


def in_column(name: str) -> tuple[Callable, Callable]:
    return lambda row: row[name], lambda row, text: row.__setitem__(name, text)


def in_first_message(column: str, key: str) -> tuple[Callable, Callable]:
    return (
        lambda row: row[column][0][key],
        lambda row, text: row[column][0].__setitem__(key, text),
    )


def chat(index: int, seed: int, column: str, keys: tuple[str, str], roles: Sequence[str]) -> dict:
    user, assistant, system = roles
    texts = [(user, text_of(index, seed)), (assistant, text_of(index + 1, seed + 90))]
    if index % 3 == 0:
        texts += [(user, text_of(index + 2, seed + 91)), (assistant, "Sì, {certo}!")]
    if index % 4 == 0:
        texts.insert(1, (system, "Be brief."))
    return {column: [dict(zip(keys, text, strict=True)) for text in texts]}


SHAPES = {
    "text": ShapeCase(
        {"task": "text", "text_column": "body"},
        lambda index, seed: {"id": str(index), "body": text_of(index, seed)},
        *in_column("body"),
        "body",
        "",
    ),
    "labelled": ShapeCase(
        {"text_column": "tweet", "label_column": "class"},
        lambda index, seed: {"tweet": text_of(index, seed), "class": LABELS[index % 3]},
        *in_column("tweet"),
        "tweet",
        "class",
    ),
    "completion": ShapeCase(
        {
            "task": "completion",
            "prompt_column": "question",
            "completion_column": "reply",
            "prompt_template": "Q: {prompt}\nA:",
        },
        lambda i, seed: {"question": text_of(i, seed), "reply": text_of(i + 1, seed + 90)},
        *in_column("question"),
        "question",
        "reply",
    ),
    "instruction": ShapeCase(
        {
            "task": "completion",
            "completion_column": "output",
            "prompt_template": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
            "### Response:\n",
        },
        lambda i, seed: {
            "instruction": text_of(i, seed) if i % 5 == 0 else INSTRUCTIONS[i % 4],
            "input": "" if i % 5 == 0 else text_of(i, seed),
            "output": text_of(i + 1, seed + 90),
        },
        *in_column("instruction"),
        "instruction",
        "output",
    ),
    "chat": ShapeCase(
        {
            "task": "completion",
            "prompt_template": "{messages}\nassistant:",
        },
        lambda i, seed: chat(
            i, seed, "messages", ("role", "content"), ("user", "assistant", "system")
        ),
        *in_first_message("messages", "content"),
        "messages",
        "messages",
        (".jsonl", ".parquet"),
    ),
    "sharegpt": ShapeCase(
        {
            "task": "completion",
            "prompt_template": "{messages}\nassistant:",
            "messages_column": "conversations",
        },
        lambda i, seed: chat(
            i, seed, "conversations", ("from", "value"), ("human", "gpt", "system")
        ),
        *in_first_message("conversations", "value"),
        "conversations",
        "conversations",
        (".jsonl", ".parquet"),
    ),
}
# What findings that are about a row's whole text are said to be in.
WHOLE = {"instruction": "instruction, input"}


def clean(shape: str) -> Dataset:
    make = SHAPES[shape].make
    return Dataset(
        shape,
        {
            split: [make(index, seed) for index in range(size)]
            for seed, (split, size) in enumerate(SIZES.items())
        },
    )


def data_of(shape: str, paths: dict[str, str], params: dict[str, Any]) -> Data:
    base = {"max_length": 2048, "max_invalid_fraction": 0.5, "on_leak": "drop"}
    return Data(**(base | SHAPES[shape].params | paths | params))


@dataclass
class Result:
    """What validation said and left."""

    validated: Validated
    findings: pd.DataFrame
    splits: dict[str, pd.DataFrame]

    @property
    def places(self) -> list[tuple[str, int, str, str]]:
        found = self.findings
        assert [Path(f).stem for f in found["file"]] == found["split"].tolist()
        return sorted(
            zip(found["split"], found["row"], found["check"], found["column"], strict=True)
        )


def check(dataset: Dataset, suffix: str, params: dict[str, Any], encoder: TextEncoder) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prepared").mkdir()
        data = data_of(dataset.shape, dataset.write(folder, suffix), params)
        validated = validate(data, encoder, folder / "prepared")
        splits = {}
        if not validated.problems:
            splits = {
                s: pq.read_table(folder / f"prepared/{s}.parquet").to_pandas() for s in SPLITS
            }
        return Result(validated, validated.findings.frame(), splits)


@functools.cache
def clean_result(shape: str, suffix: str, encoder: TextEncoder) -> Result:
    return check(clean(shape), suffix, {}, encoder)


CLEAN = [
    (shape, suffix)
    for shape, case in SHAPES.items()
    for suffix in (".csv", ".jsonl", ".parquet")
    if suffix in case.formats
]


@pytest.mark.parametrize(("shape", "suffix"), CLEAN, ids=["-".join(case) for case in CLEAN])
def test_nothing_is_found_in_clean_datasets(shape: str, suffix: str, encoder: TextEncoder) -> None:
    result = clean_result(shape, suffix, encoder)
    assert result.findings[["row", "check", "value", "reason"]].values.tolist() == []
    assert result.validated.problems == []
    assert result.validated.rows == SIZES
    dataset = clean(shape)
    for split, rows in result.splits.items():
        assert rows["row"].tolist() == list(range(1, SIZES[split] + 1))
        first, *second = FIELDS[result.validated.task]
        for row, text in zip(rows["row"], rows[first], strict=True):
            assert dataset.text((split, row)).strip() in text
        if shape not in ("chat", "sharegpt") and second:
            answers = [row[SHAPES[shape].answer] for row in dataset.rows[split]]
            assert rows[second[0]].tolist() == answers


NATURAL = {
    "vietnamese": "Tôi đã đọc cuốn sách ấy ba lần rồi mà vẫn chưa hiểu hết, bạn ạ!",
    "polish": "Zażółć gęślą jaźń, pchnąć w tę łódź jeża – ośm skrzyń fig.",
    "turkish": "Pijamalı hasta yağız şoföre çabucak güvendi, İĞÜŞÖÇ.",
    "french": "« L’été dernier », dit-elle, « où étions-nous… ? » – Œuvre n° 5, cœur naïf, ça !",
    "portuguese": "NÃO HÁ SOLUÇÃO À VISTA: SÃO JOÃO, CORAÇÃO E AÇÃO",
    "german": "„Straße“, sagte er, ‚Größe‘ – ÄÖÜ: 100 % ≥ 25 °C ± 3 µm",
    "japanese": "東京は雨です。ﾊﾝｶｸと全角ＡＢＣ！「はい」",
    "arabic": "السلام عليكم، كيف حالك؟ ١٢٣",
    "hebrew": "שלום עולם, מה שלומך היום?",
    "hindi": "नमस्ते, आप कैसे हैं? क्‍या हाल है।",
    "thai": "สวัสดีครับ วันนี้อากาศดี",
    "korean": "안녕하세요, 오늘 날씨가 좋네요.",
    "greek": "Καλημέρα, τι κάνεις; Πολύ καλά!",
    "persian-joiner": "می‌خواهم کتاب‌ها را بخوانم",
    "emoji-sequences": "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ ©️ ™ ♥",
    "box-drawing": "┌──┬──┐\n│ a│ b│\n└──┴──┘ █▓▒░",
    "phonetic": "/ˈɪŋɡlɪʃ ˈlæŋɡwɪdʒ/, [ʁaˈdikal]",
    "maths": "∀x∈ℝ: x² ≥ 0 ∧ ∑ᵢ aᵢ·bᵢ ≠ ∞, ∂f/∂x → 0, 5×3 ÷ 2",
    "latex": r"\begin{equation} \alpha & \beta \\ x &= y; \frac{1}{2} \end{equation}",
    "c-address": "int *p = &count; scanf(&buffer);\nif (a &&ready; b) swap(&left, &right);",
    "shell": 'make 2>&1 | tee log; cat a&b; echo "$HOME" & wait',
    "html-tags": '<p class="x">1 < 2 & 3 > 2</p><br/>',
    "json": '{"a": [1, null, {"b": "c\\u00e9\\n"}], "d": "\\\\"}',
    "csv-inside": 'a,b\n"x, y","said ""hi"""\n',
    "windows": "C:\\Users\\new\\table.txt\r\nsecond line\r\n\ttabbed",
    "sql": "SELECT * FROM t WHERE a='x;y' -- &c; LIKE '%{b}%'",
    "regex": r"^(?:[^\W_]+|\d{2,3}){1,5}$ &[a-z]+",
    "currency": "£5 — €7,50 – ¥900 … ₹3 § 12 ¶ † ‡ • ¿Qué? ¡Sí! ª º",
    "null-word": "null NaN None N/A nan",
    "token-like": "<|end|> </s <eos [PAD",
}


@pytest.mark.parametrize("text", NATURAL.values(), ids=NATURAL)
def test_no_false_alarm_on_natural_text(text: str, encoder: TextEncoder) -> None:
    dataset = clean("labelled")
    dataset.put(("train", 17), text)
    result = check(dataset, ".csv", {}, encoder)
    assert result.findings[["row", "check", "reason"]].values.tolist() == []
    assert result.splits["train"].set_index("row")["text"][17] == text


HARMLESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "byte-order-mark": (".csv", lambda content: b"\xef\xbb\xbf" + content),
    "byte-order-mark-jsonl": (".jsonl", lambda content: b"\xef\xbb\xbf" + content),
    "blank-lines-at-the-end": (".csv", lambda content: content + b"\r\n\r\n"),
    "no-newline-at-the-end": (".jsonl", lambda content: content.rstrip(b"\n")),
    "windows-lines": (".jsonl", lambda content: content.replace(b"\n", b"\r\n")),
    "escaped-unicode": (
        ".jsonl",
        lambda content: b"".join(
            (json.dumps(json.loads(row)) + "\n").encode() for row in content.splitlines()
        ),
    ),
    "a-json-array": (
        ".json",
        lambda content: b"[" + b",\n".join(content.rstrip(b"\n").split(b"\n")) + b"]",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_is_found_in_another_spelling_of_a_file(
    name: str, tmp_path: Path, encoder: TextEncoder
) -> None:
    suffix, spell = HARMLESS[name]
    paths = clean("labelled").write(tmp_path, ".jsonl" if suffix == ".json" else suffix)
    for split, path in paths.items():
        spelled = Path(path).with_suffix(suffix)
        spelled.write_bytes(spell(Path(path).read_bytes()))
        paths[split] = str(spelled)
    (tmp_path / "prepared").mkdir()
    validated = validate(data_of("labelled", paths, {}), encoder, tmp_path / "prepared")
    assert validated.findings.frame().empty and not validated.problems
    assert validated.rows == SIZES


# --- kinds of damage -----------------------------------------------------------------------------

Place = tuple[str, int]


@dataclass(frozen=True)
class Found:
    """A finding that damage must lead to."""

    place: Place
    check: str
    column: str
    reason: str
    dropped: bool
    other: Place | None = None


@dataclass(frozen=True)
class Damage:
    """A kind of damage.

    Attributes:
        do: damages a row, or is given the rows to damage all at once and returns what must be
            found.
        check: what must be found at the row, with `column`, part of the `reason`, and whether the
            row is `dropped`.
        problem: part of the only line that refuses the dataset, if any does.
        flavours: rows that it can be done to, by the kind of their text.
    """

    name: str
    shape: str
    formats: str
    do: Callable[..., Any]
    check: str = ""
    column: str = ""
    reason: str = ""
    dropped: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    flavours: tuple[Callable, ...] = FLAVOURS

    def places(self, suffix: str) -> list[Place]:
        """Return rows to damage: four of train, one of each other split, none of the last ones."""
        chosen = random.Random(zlib.crc32(f"{self.name} {suffix}".encode()))
        fits = {
            split: [i + 1 for i in range(size - 4) if FLAVOURS[i % len(FLAVOURS)] in self.flavours]
            for split, size in SIZES.items()
        }
        return [
            (split, row)
            for split, count in (("train", 4), ("validation", 1), ("test", 1))
            for row in sorted(chosen.sample(fits[split][1:], min(count, len(fits[split]) - 1)))
        ]


KINDS: list[Damage] = []


def each(
    name: str, shape: str, formats: str, edit: Callable[[str], str], check: str, reason: str, **more
) -> None:
    """Add a kind that changes the text of each row by itself."""

    def do(dataset: Dataset, place: Place) -> None:
        before = dataset.text(place)
        dataset.put(place, edit(before))
        assert dataset.text(place) != before

    column = more.pop("column", SHAPES[shape].column)
    KINDS.append(Damage(name, shape, formats, do, check, column, reason, **more))


def cell(
    name: str, shape: str, formats: str, column: str, value: Any, check: str, reason: str, **more
) -> None:
    """Add a kind that puts a value in a column, or takes the column away (`...`)."""

    def do(dataset: Dataset, place: Place) -> None:
        row = dataset.row(place)
        if value is ...:
            del row[column]
        else:
            row[column] = value(row) if callable(value) else value

    KINDS.append(Damage(name, shape, formats, do, check, column, reason, **more))


ALL = "csv jsonl parquet"
BLANK = "is empty or only whitespace"

for shape in ("text", "labelled", "completion", "instruction"):
    column = SHAPES[shape].column
    each(f"{shape}-empty", shape, ALL, lambda text: "", "empty", BLANK)
    cell(f"{shape}-null", shape, "jsonl parquet", column, None, "missing", "is missing")
    cell(f"{shape}-key-absent", shape, "jsonl", column, ..., "missing", "is missing")
each("whitespace", "labelled", ALL, lambda text: " \t\n  ", "empty", BLANK)
each("no-break-space-only", "text", ALL, lambda text: "\xa0\u202f\u3000", "empty", BLANK)

TYPES: dict[str, tuple[Any, str]] = {
    "integer": (7, "is an integer, not text"),
    "number": (7.5, "is a number, not text"),
    "boolean": (True, "is a boolean, not text"),
    "list": (["a", "b"], "is a list, not text"),
    "object": ({"a": "b"}, "is an object, not text"),
}
for name, (value, reason) in TYPES.items():
    cell(f"text-is-{name}", "labelled", "jsonl", "tweet", value, "type", reason)
    if name not in ("integer", "boolean"):  # 0 and true may well be answers
        cell(f"label-is-{name}", "labelled", "jsonl", "class", value, "type", reason)
        cell(f"completion-is-{name}", "completion", "jsonl", "reply", value, "type", reason)
cell("input-is-list", "instruction", "jsonl", "input", [1], "type", "is a list, not text")

for shape in ("text", "labelled"):
    each(f"{shape}-nul", shape, ALL, lambda t: t[:9] + "\0" + t[9:], "nul", "NUL character")
    each(
        f"{shape}-replacement",
        shape,
        ALL,
        lambda t: t[:9] + "\ufffd" + t[10:],
        "replacement",
        "holds U+FFFD",
    )
cell("label-nul", "labelled", ALL, "class", "sehr\0gut", "nul", "NUL character")
cell("completion-replacement", "completion", ALL, "reply", "a\ufffdb", "replacement", "U+FFFD")
each("half-a-surrogate-pair", "labelled", "jsonl", lambda t: t + "\ud83d", "replacement", "U+FFFD")
UNDECODABLE = "holds bytes that are not UTF-8"
for shape in ("text", "labelled", "instruction"):
    each(
        f"{shape}-latin-1-bytes",
        shape,
        "csv jsonl",
        lambda t: t + " caf\udce9",
        "undecodable",
        UNDECODABLE,
    )
each(
    "half-a-character",
    "completion",
    "csv jsonl",
    lambda t: "\udcc3 " + t,
    "undecodable",
    UNDECODABLE,
)
cell(
    "label-latin-1-bytes", "labelled", "csv jsonl", "class", "caf\udce9", "undecodable", UNDECODABLE
)

for name, character, escaped in (
    ("bell", "\x07", "\\x07"),
    ("escape", "\x1b[1m", "\\x1b"),
    ("delete", "\x7f", "\\x7f"),
):
    each(
        f"control-{name}",
        "labelled",
        ALL,
        lambda t, c=character: t[:5] + c + t[5:],
        "control",
        f"holds the control character '{escaped}'",
        dropped=False,
    )


def misread(encoding: str, times: int = 1) -> Callable[[str], str]:
    """Return what reads UTF-8 as another encoding; undefined bytes as browsers do, as Latin-1."""

    def read(text: str) -> str:
        for _ in range(times):
            text = "".join(
                bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode()
            )
        return text

    return read


MISREAD = "looks like UTF-8 read as another encoding"
NOT_ASCII = (european, russian, asian)
for name, encoding, times, flavours in (
    ("latin-1", "latin-1", 1, (*NOT_ASCII, emoji)),
    ("cp1252", "cp1252", 1, (*NOT_ASCII, emoji)),
    # Of other alphabets twice misread so few different characters are left that texts get alike.
    ("cp1252-twice", "cp1252", 2, (european, emoji)),
):
    each(
        f"mojibake-{name}",
        "labelled",
        ALL,
        misread(encoding, times),
        "mojibake",
        MISREAD,
        dropped=False,
        flavours=flavours,
    )
each(
    "mojibake-cp1251",
    "text",
    ALL,
    misread("cp1251"),
    "mojibake",
    MISREAD,
    dropped=False,
    flavours=(russian,),
)
each(
    "mojibake-one-character",
    "completion",
    ALL,
    lambda t: f"{t} naÃ¯ve cafÃ©s",
    "mojibake",
    MISREAD,
    dropped=False,
    flavours=(prose, code, link),
)
each(
    "mojibake-quotes",
    "text",
    ALL,
    lambda t: f"{t} itâ€™s",
    "mojibake",
    MISREAD,
    dropped=False,
    flavours=(prose, link),
)
cell(
    "mojibake-completion",
    "completion",
    ALL,
    "reply",
    lambda row: misread("cp1252")("Ça été, là"),
    "mojibake",
    MISREAD,
    dropped=False,
)

for name, entity, shown in (
    ("named", "&quot;", "&quot;"),
    ("decimal", "&#8217;", "&#8217;"),
    ("hexadecimal", "&#x2019;", "&#x2019;"),
    ("twice", "&amp;lt;", "&amp;"),
):
    edit = functools.partial(lambda e, t: f"{t[:20]}{e}{t[20:]}", entity)
    reason = f"holds the HTML entity {shown}"
    each(f"html-{name}", "labelled", ALL, edit, "html", reason, dropped=False)
cell("html-completion", "completion", ALL, "reply", "Tom &amp; Li", "html", "&amp;", dropped=False)
for shape in ("text", "labelled", "instruction"):
    each(
        f"{shape}-special-token",
        shape,
        ALL,
        lambda t: f"{t[:8]}{SPECIAL}{t[8:]}",
        "special_token",
        "name of a special token",
        dropped=False,
    )
cell(
    "completion-special-token",
    "completion",
    ALL,
    "reply",
    f"yes{SPECIAL}",
    "special_token",
    "name of a special token",
    dropped=False,
)

cell("label-empty", "labelled", "csv", "class", "", "empty", BLANK)
cell("label-null", "labelled", "jsonl parquet", "class", None, "missing", "is missing")
cell("label-absent", "labelled", "jsonl", "class", ..., "missing", "is missing")
cell("label-blank", "labelled", ALL, "class", " \xa0 ", "empty", BLANK)
cell(
    "label-not-in-data.labels",
    "labelled",
    ALL,
    "class",
    "prima",
    "unknown_label",
    "is none of data.labels",
    params={"labels": LABELS},
)
cell("reply-empty", "completion", ALL, "reply", "", "empty", BLANK)
cell("output-null", "instruction", "jsonl parquet", "output", None, "missing", "is missing")
cell("output-absent", "instruction", "jsonl", "output", ..., "missing", "is missing")
cell(
    "completion-too-long",
    "completion",
    ALL,
    "reply",
    "x" * 2100,
    "room",
    "leaves no room for prompt within data.max_length = 2048",
)
cell(
    "output-too-long",
    "instruction",
    ALL,
    "output",
    "x" * 2100,
    "room",
    "leaves no room for prompt within data.max_length = 2048",
)
cell("label-too-long", "labelled", ALL, "class", "x" * 2100, "room", "leaves no room for text")


def lengthen(text: str, chosen: random.Random = random.Random(0)) -> str:  # noqa: B008
    """Add some thousand letters, never the same twice: instructions are shared by many rows."""
    return f"{text} {line(chosen, latin, 600)}"


for shape in ("labelled", "completion", "instruction"):
    each(
        f"{shape}-truncated",
        shape,
        ALL,
        lengthen,
        "truncated",
        "tokens at its end",
        dropped=False,
        column=WHOLE.get(shape, SHAPES[shape].column),
    )
SPELLINGS: dict[str, Callable[[dict], str]] = {
    "case": lambda row: row["class"].upper(),
    "space": lambda row: row["class"].replace(" ", "  ", 1),
    "no-break-space": lambda row: row["class"].replace(" ", "\xa0", 1),
    "decomposed": lambda row: unicodedata.normalize("NFD", "mauvais, hélas"),
}
for name, spell in SPELLINGS.items():

    def respell(dataset: Dataset, places: list[Place], spell=spell) -> list[Found]:
        found = []
        for place in [place for place in places if place[0] == "train"]:
            row = dataset.row(place)
            row["class"] = LABELS[1]
            row["class"] = spell(row)
            reason = f"differs from {LABELS[1]!r}, which more rows have, in its spelling alone"
            found.append(Found(place, "label_case", "class", reason, False))
        return found

    KINDS.append(Damage(f"label-other-{name}", "labelled", ALL, respell, problem="differ only in"))


def unseen(dataset: Dataset, places: list[Place]) -> list[Found]:
    later = [place for place in places if place[0] == "test"]
    for place in later:
        dataset.row(place)["class"] = "prima"
    return [Found(p, "unseen_label", "class", "is in no row of train", False) for p in later]


KINDS.append(
    Damage(
        "label-unseen-in-train",
        "labelled",
        ALL,
        unseen,
        problem="labels in test that train never shows: 'prima'",
    )
)


def one_class(split: str) -> Callable[[Dataset, list[Place]], list[Found]]:
    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        for row in dataset.rows[split]:
            row["class"] = LABELS[0]
        return []

    return do


for split in ("validation", "test"):
    KINDS.append(
        Damage(
            f"one-label-in-{split}",
            "labelled",
            ALL,
            one_class(split),
            problem=f"the {split} split has one label only, 'sehr gut'",
        )
    )


def emptied(dataset: Dataset, places: list[Place]) -> list[Found]:
    for row in dataset.rows["validation"]:
        row["question"] = ""
    rows = range(1, SIZES["validation"] + 1)
    return [Found(("validation", n), "empty", "question", BLANK, True) for n in rows]


KINDS.append(
    Damage(
        "no-valid-row-in-validation",
        "completion",
        ALL,
        emptied,
        problem="the validation split has no rows left",
    )
)


def too_many(dataset: Dataset, places: list[Place]) -> list[Found]:
    for place in places:
        dataset.put(place, "")
    return [Found(place, "empty", "body", BLANK, True) for place in places]


KINDS.append(
    Damage(
        "too-many-invalid",
        "text",
        ALL,
        too_many,
        params={"max_invalid_fraction": 0.05},
        problem="invalid rows: 6 of 108, more than data.max_invalid_fraction = 0.05",
    )
)
KINDS.append(
    Damage(
        "on-invalid-error",
        "text",
        ALL,
        too_many,
        params={"on_invalid": "error"},
        problem="invalid rows: 6 of 108, data.on_invalid is error",
    )
)


def related(name: str, shape: str, check: str, edit: Callable[[str], str] | None, **more) -> None:
    """Add kinds in which a row is an edited copy of one of its own split, or of a later one."""
    near = check.startswith("near")
    words = "is nearly the same as" if near else "is the same as"
    column = WHOLE.get(shape, SHAPES[shape].column)
    leak = check.endswith("leak")
    between = more.pop("between", ("train", "test"))
    dropped = more.pop("dropped", leak or not near)

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        rows = [place[1] for place in places if place[0] == "train"]
        found: list[Found] = []
        for turn, row in enumerate(rows):
            if leak:  # of a source in the shorter split the flavour is that of the row all the same
                one, later = between
                source = (one, (row - 1) % SIZES[one] + 1)
                target = (later, SIZES[later] - 3 * turn)
                if any(source == known.place for known in found):
                    continue
            else:
                source, target = ("train", row), ("train", SIZES["train"] - turn)
            dataset.copy(source, target)
            if edit is not None:
                before = dataset.text(source)
                dataset.put(target, edit(before))
                assert dataset.text(target) != before
            place, other = (source, target) if leak else (target, source)
            found.append(Found(place, check, column, words, dropped, other))
        assert len(found) >= 3
        return found

    KINDS.append(
        Damage(name, shape, " ".join(suffix[1:] for suffix in SHAPES[shape].formats), do, **more)
    )


def with_whitespace(text: str) -> str:
    return f" {text.replace(' ', '  ', 2)}\n"


def other_word(text: str) -> str:
    words = text.split(" ")
    words[-2] = "zzyzxa"
    return " ".join(words)


def other_punctuation(text: str) -> str:
    return text.replace(",", " -").rstrip(".!?") + "?!"


def three_edits(text: str) -> str:
    return other_punctuation(other_word(text)).upper()


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


LONG = (prose, russian)
EDITED: dict[str, tuple[Callable[[str], str], tuple[Callable, ...]]] = {
    "case": (str.swapcase, LONG),
    "punctuation": (other_punctuation, LONG),
    "word": (other_word, LONG),
    "three-edits": (three_edits, LONG),
    "decomposed-and-punctuation": (lambda t: decomposed(t) + " !!", (european,)),
}
for shape in SHAPES:
    related(f"{shape}-duplicate", shape, "duplicate", None)
    related(f"{shape}-leak", shape, "leak", None)
    related(f"{shape}-near-leak", shape, "near_leak", three_edits, flavours=LONG)
related("duplicate-whitespace", "labelled", "duplicate", with_whitespace, flavours=(prose, code))
related("duplicate-decomposed", "labelled", "duplicate", decomposed, flavours=(european,))
related("leak-whitespace", "labelled", "leak", with_whitespace, flavours=(prose, code))
related("leak-decomposed", "completion", "leak", decomposed, flavours=(european,))
for one, later in (("train", "validation"), ("validation", "test")):
    related(f"leak-{one}-{later}", "labelled", "leak", None, between=(one, later))
    related(
        f"near-leak-{one}-{later}",
        "text",
        "near_leak",
        three_edits,
        between=(one, later),
        flavours=LONG,
    )
for name, (edit, flavours) in EDITED.items():
    related(f"near-duplicate-{name}", "labelled", "near_duplicate", edit, flavours=flavours)
    related(f"near-leak-{name}", "labelled", "near_leak", edit, flavours=flavours)
related(
    "near-duplicate-dropped",
    "completion",
    "near_duplicate",
    three_edits,
    flavours=LONG,
    dropped=True,
    params={"on_near_duplicate": "drop"},
)
related("leak-warned", "labelled", "leak", None, dropped=False, params={"on_leak": "warn"})
related(
    "leak-error",
    "labelled",
    "leak",
    None,
    dropped=False,
    params={"on_leak": "error"},
    problem="some texts are in two splits (4 in train and test)",
)
related(
    "near-leak-error",
    "labelled",
    "near_leak",
    three_edits,
    dropped=False,
    flavours=LONG,
    params={"on_leak": "error"},
    problem="some texts are nearly in two splits (4",
)


def conflicting(change: Callable[[dict], None]) -> Callable[[Dataset, list[Place]], list[Found]]:
    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        found = []
        column = WHOLE.get(dataset.shape, SHAPES[dataset.shape].column)
        for turn, (_, row) in enumerate(p for p in places if p[0] == "train"):
            source, target = ("train", row), ("train", SIZES["train"] - turn)
            change(dataset.copy(source, target))
            for place in (source, target):
                found.append(Found(place, "conflict", column, "has 2 different answers: ", False))
        return found

    return do


def other_label(row: dict) -> None:
    row["class"] = LABELS[(LABELS.index(row["class"]) + 1) % 3]


def other_last_message(row: dict) -> None:
    row["messages"][-1]["content"] = "No."


KINDS += [
    Damage("conflicting-labels", "labelled", ALL, conflicting(other_label)),
    Damage(
        "conflicting-completions",
        "completion",
        ALL,
        conflicting(lambda row: row.__setitem__("reply", "No.")),
    ),
    Damage(
        "conflicting-outputs",
        "instruction",
        ALL,
        conflicting(lambda row: row.__setitem__("output", "No.")),
    ),
    Damage("conflicting-last-messages", "chat", "jsonl parquet", conflicting(other_last_message)),
]


def raw(name: str, formats: str, line: Callable[[bytes], bytes], reason: str) -> None:
    """Add a kind that writes the line of a row otherwise."""

    def do(dataset: Dataset, place: Place) -> None:
        suffix = f".{formats}"
        dataset.raw[place] = line(as_line(dataset.row(place), suffix))

    KINDS.append(Damage(name, "labelled", formats, do, "malformed", "", reason))


raw("csv-cell-too-few", "csv", lambda line: b"only one cell\r\n", "has 1 cells on line")
raw(
    "csv-cell-too-many", "csv", lambda line: b"a text, unquoted,sehr gut\r\n", "has 3 cells on line"
)
raw("json-cut-off", "jsonl", lambda line: line[:20] + b"\n", "is not valid JSON: ")
raw("json-single-quotes", "jsonl", lambda line: b"{'tweet': 'a'}\n", "is not valid JSON: ")
raw(
    "json-two-in-a-line", "jsonl", lambda line: line.strip() + line, "is not valid JSON: Extra data"
)
raw("json-raw-control", "jsonl", lambda line: b'{"tweet": "a\x01"}\n', "is not valid JSON: Invalid")
raw("json-list-line", "jsonl", lambda line: b'["a", "sehr gut"]\n', "is not a JSON object")
raw("json-string-line", "jsonl", lambda line: b'"a"\n', "is not a JSON object")
raw(
    "json-huge-number",
    "jsonl",
    lambda line: b'{"tweet": ' + b"9" * 5000 + b"}\n",
    "is not usable JSON",
)
raw("json-deep", "jsonl", lambda line: b"[" * 200_000 + b"\n", "is not usable JSON")


def conversation(name: str, change: Callable[[list], Any], reason: str, check="messages") -> None:
    """Add kinds that change a conversation, in both spellings."""
    for shape, column, key, role in (
        ("chat", "messages", "content", "role"),
        ("sharegpt", "conversations", "value", "from"),
    ):

        def do(dataset: Dataset, place: Place, column=column, key=key, role=role) -> None:
            row = dataset.row(place)
            plain = [(message[role], message[key]) for message in row[column]]
            changed = change(plain)
            row[column] = (
                [dict(zip((role, key), message, strict=True)) for message in changed]
                if isinstance(changed, list) and changed and isinstance(changed[0], tuple)
                else changed
            )

        same_type = name not in ("not-a-list", "a-message", "text-messages", "number-content")
        formats = "jsonl parquet" if same_type else "jsonl"
        name_of_kind, dropped = f"{shape}-{name}", CHECKS[check].kind is Kind.INVALID
        KINDS.append(
            Damage(name_of_kind, shape, formats, do, check, column, reason, dropped=dropped)
        )


def first(change: Callable[[str], Any]) -> Callable[[list], list]:
    return lambda plain: [(plain[0][0], change(plain[0][1])), *plain[1:]]


conversation("unknown-role", lambda p: [("robot", p[0][1]), *p[1:]], "message 1 has no role of")
conversation("no-role", lambda p: [(None, p[0][1]), *p[1:]], "message 1 has no role of")
conversation("empty-content", lambda p: [*p[:-1], (p[-1][0], " \n")], "is empty")
conversation("null-content", first(lambda t: None), "message 1 has no text")
conversation("number-content", first(lambda t: 5), "message 1 has no text")
conversation("no-user", lambda p: [("system", "Be."), p[-1]], "has no message of the user")
conversation("ends-with-user", lambda p: [*p, ("user", "And?")], "does not end with the assistant")
conversation("one-message", lambda p: [p[-1]], "has fewer than two messages")
conversation("no-message", lambda p: [], "has fewer than two messages")
conversation("not-a-list", lambda p: "user: a", "is a text, not a list of messages", "type")
conversation("a-message", lambda p: {"role": "user"}, "is an object, not a list of", "type")
conversation("text-messages", lambda p: ["a", "b"], "message 1 has no role of")
conversation("null", lambda p: None, "is missing", "missing")
conversation("nul", first(lambda t: f"a\0{t}"), "holds a NUL character", "nul")
conversation("replacement", first(lambda t: f"a\ufffd{t}"), "holds U+FFFD", "replacement")
conversation("control", first(lambda t: f"a\x07{t}"), "the control character '\\x07'", "control")
conversation("html", first(lambda t: f"&lt;{t}"), "holds the HTML entity &lt;", "html")
conversation("mojibake", first(lambda t: f"cafÃ© {t}"), MISREAD, "mojibake")
conversation("special-token", first(lambda t: f"{SPECIAL}{t}"), "a special token", "special_token")
for shape in ("chat", "sharegpt"):
    each(
        f"{shape}-latin-1-bytes",
        shape,
        "jsonl",
        lambda t: f"{t} caf\udce9",
        "undecodable",
        UNDECODABLE,
    )
    each(
        f"{shape}-truncated",
        shape,
        "jsonl parquet",
        lengthen,
        "truncated",
        "tokens at its end",
        dropped=False,
    )


def formats_of(kind: Damage) -> list[str]:
    """Return the formats to try: all that can have this damage in a cell, one for the others."""
    formats = [f".{suffix}" for suffix in kind.formats.split()]
    one = formats[zlib.crc32(kind.name.encode()) % len(formats)]
    return formats if kind.check and kind.shape in ("text", "labelled") else [one]


CASES = [(kind, suffix) for kind in KINDS for suffix in formats_of(kind)]


def test_there_are_enough_kinds() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 36


@pytest.mark.parametrize(
    ("kind", "suffix"), CASES, ids=[f"{kind.name}{suffix}" for kind, suffix in CASES]
)
def test_damage_is_found_where_it_was_done(kind: Damage, suffix: str, encoder: TextEncoder) -> None:
    dataset, places = clean(kind.shape), kind.places(suffix)
    assert len(places) >= 4
    if kind.check:
        for place in places:
            kind.do(dataset, place)
        expected = [Found(p, kind.check, kind.column, kind.reason, kind.dropped) for p in places]
    else:
        expected = kind.do(dataset, places)
    result = check(dataset, suffix, kind.params, encoder)
    assert result.places == sorted((*f.place, f.check, f.column) for f in expected)
    rows = result.findings.set_index(["split", "row", "check"])
    for found in expected:
        row = rows.loc[(*found.place, found.check)]
        assert found.reason in row["reason"]
        assert row["dropped"] == found.dropped
        other = found.other and (Path(row["other_file"]).stem, row["other_row"])
        assert other == found.other
    problems = result.validated.problems
    if kind.problem is not None:
        assert len(problems) == 1 and kind.problem in problems[0]
        return
    assert problems == []
    touched = {found.place for found in expected} | {f.other for f in expected if f.other}
    gone = {found.place for found in expected if found.dropped}
    before = clean_result(kind.shape, suffix, encoder).splits
    for split, rows in result.splits.items():
        left = [n for n in range(1, SIZES[split] + 1) if (split, n) not in gone]
        assert rows["row"].tolist() == left
        same = [n for n in left if (split, n) not in touched]
        fields = list(FIELDS[result.validated.task])
        was, now = (frame.set_index("row").loc[same, fields] for frame in (before[split], rows))
        assert was.equals(now)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


UNUSABLE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "quote-never-closed": (".csv", lambda c: c + b'"never closed,x\r\n', "never closed"),
    "quote-inside": (".csv", lambda c: c + b'"said "hi" to",x\r\n', "text follows a closing quote"),
    "no-such-column": (".csv", lambda c: c.replace(b"tweet", b"twit", 1), "has no column tweet"),
    "semicolons": (".csv", lambda c: b"tweet;class\r\na;b\r\n", "separated by commas?"),
    "column-twice": (".csv", lambda c: c.replace(b"class", b"tweet", 1), "more than one column"),
    "utf-16": (".csv", lambda c: c.decode().encode("utf-16"), "is UTF-16 and not UTF-8"),
    "empty": (".csv", lambda c: b"", "is empty"),
    "header-only": (".csv", lambda c: b"tweet,class\r\n", "has no rows"),
    "array-cut-off": (".json", lambda c: b"[" + c.splitlines()[0] + b",", "is not valid JSON"),
    "indented-objects": (".jsonl", lambda c: b'{\n "tweet": "a"\n}\n', "an object on each line"),
    "gzip-cut-off": (".csv.gz", lambda c: cut(gzip.compress(c)), "cannot be decompressed"),
    "not-gzip": (".csv.gz", lambda c: c, "cannot be decompressed"),
    "not-parquet": (".parquet", lambda c: c, "is not a Parquet file"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named(
    name: str, tmp_path: Path, encoder: TextEncoder
) -> None:
    suffix, damage, message = UNUSABLE[name]
    paths = clean("labelled").write(tmp_path, ".jsonl" if "json" in suffix else ".csv")
    content = Path(paths["validation"]).read_bytes()
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(damage(content))
    (tmp_path / "prepared").mkdir()
    with pytest.raises(UserError) as error:
        validate(
            data_of("labelled", paths | {"validation": str(bad)}, {}),
            encoder,
            tmp_path / "prepared",
        )
    assert str(error.value).startswith(str(bad)) and message in str(error.value)
    assert "\n" not in str(error.value)


# --- shifts between splits -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_lengths_of_shifted_splits_are_told_from_those_of_equal_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.poisson(mean, size) for mean, size in ((80, 4000), (80, 900), (110, 900))]
    counts = [np.bincount(length) for length in lengths]
    for other, notable in ((1, False), (2, True)):
        shift = length_shift(counts[0], counts[other])
        exact = ks_2samp(lengths[0], lengths[other], method="asymp")
        assert shift.distance == pytest.approx(exact.statistic, abs=1e-12)
        assert shift.p_value == pytest.approx(exact.pvalue, rel=0.1, abs=1e-3)
        assert bool(shift.notable) is notable


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_shifted_splits_are_told_from_those_of_equal_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0], [0.2, 0.3, 0.4, 0.1])
    one, same, shifted = (
        rng.multinomial(n, p) for n, p in zip((4000, 900, 900), shares, strict=True)
    )
    for other, notable in ((same, False), (shifted, True)):
        shift = label_shift(one, other)
        table = np.stack([one, other])
        table = table[:, table.any(axis=0)]
        assert shift.p_value == pytest.approx(chi2_contingency(table).pvalue)
        by_hand = sum(abs(a / one.sum() - b / other.sum()) for a, b in zip(one, other, strict=True))
        assert shift.distance == pytest.approx(by_hand / 2)
        assert bool(shift.notable) is notable


# --- leaks among many texts ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tweets", "paragraphs"])
def leak_corpus(request: pytest.FixtureRequest) -> tuple[Words, list[str]]:
    words = Words()
    return words, corpus(CORPORA[request.param], words, 2000)


def test_pairs_to_keep_out_of_a_leak_corpus_are_those_of_brute_force() -> None:
    words, rng = Words(), np.random.default_rng(1)
    texts = [CORPORA["instructions"](words, rng) for _ in range(120)]
    texts += [EDITS[edit](text, words, rng) for text in texts[:20] for edit in EDITS]
    normalized = [normalize(text) for text in texts]
    for threshold in (0.4, 0.7):
        by_hand = {
            (one, other)
            for other in range(len(texts))
            for one in range(other)
            if similarity(normalized[one], normalized[other]) >= threshold
        }
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
