"""Tests that clean data, natural texts and equivalent files have no findings."""

# The texts in other alphabets contain ambiguous characters on purpose.
# ruff: noqa: RUF001

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj8.dataset.prepared.dataset import FIELDS
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from tests.dataset.validation.corruption.shapes import (
    SHAPES,
    SIZES,
    check,
    clean,
    clean_result,
    data_of,
)

CLEAN = [
    (shape, suffix)
    for shape, case in SHAPES.items()
    for suffix in (".csv", ".jsonl", ".parquet")
    if suffix in case.formats
]


@pytest.mark.parametrize(("shape", "suffix"), CLEAN, ids=["-".join(case) for case in CLEAN])
def test_clean_datasets_have_no_findings(shape: str, suffix: str, encoder: TextEncoder) -> None:
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
def test_natural_text_has_no_findings(text: str, encoder: TextEncoder) -> None:
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
def test_equivalent_files_have_no_findings(name: str, tmp_path: Path, encoder: TextEncoder) -> None:
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
