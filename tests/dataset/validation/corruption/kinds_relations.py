"""Kinds of damage across rows: copies, edited copies, texts with different answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from tests.dataset.validation.corruption.damage import REASONS, Damage, Found
from tests.dataset.validation.corruption.shapes import LABELS, SIZES, WHOLE, Dataset, Place
from tests.dataset.validation.corruption.texts import code, european, prose, russian


def rows_of_train(places: list[Place]) -> list[int]:
    return [row for split, row in places if split == "train"]


def copied(
    name: str,
    shape: str,
    formats: str,
    check: str,
    edit: Callable[[str], str] | None = None,
    between: tuple[str, str] = ("train", "test"),
    dropped: bool = True,
    **more: Any,
) -> Damage:
    """Return a kind in which rows are edited copies of rows in their own or a later split."""

    def place_copies(rows: list[int]) -> dict[Place, Place]:
        if not check.endswith("leak"):
            return {
                ("train", row): ("train", SIZES["train"] - turn) for turn, row in enumerate(rows)
            }
        one, later = between
        copies: dict[Place, Place] = {}
        for turn, row in enumerate(rows):
            # The row in a shorter split has the same kind of text as the chosen row.
            source = (one, (row - 1) % SIZES[one] + 1)
            copies.setdefault(source, (later, SIZES[later] - 3 * turn))
        return copies

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        found = []
        for source, copy in place_copies(rows_of_train(places)).items():
            dataset.copy(source, copy)
            if edit is not None:
                before = dataset.text(source)
                dataset.put(copy, edit(before))
                assert dataset.text(copy) != before
            place, other = (source, copy) if check.endswith("leak") else (copy, source)
            found.append(Found(place, check, WHOLE[shape], REASONS[check], dropped, other))
        assert len(found) >= 3
        return found

    return Damage(name, shape, formats, do, **more)


def warned(name: str, formats: str, edit: Callable[[str], str], **more: Any) -> Damage:
    """Return a kind in which rows are edited copies within a split and are kept."""
    return copied(name, "labelled", formats, "near_duplicate", edit, dropped=False, **more)


def answered_twice(name: str, shape: str, formats: str, change: Callable[[dict], None]) -> Damage:
    """Return a kind in which rows are copies of other rows with a different answer."""

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        found = []
        for turn, row in enumerate(rows_of_train(places)):
            source, copy = ("train", row), ("train", SIZES["train"] - turn)
            change(dataset.copy(source, copy))
            for place in (source, copy):
                found.append(Found(place, "conflict", WHOLE[shape], REASONS["conflict"], False))
        return found

    return Damage(name, shape, formats, do)


def whitespace(text: str) -> str:
    return f" {text.replace(' ', '  ', 2)}\n"


def word(text: str) -> str:
    words = text.split(" ")
    words[-2] = "zzyzxa"
    return " ".join(words)


def punctuation(text: str) -> str:
    return text.replace(",", " -").rstrip(".!?") + "?!"


def three_edits(text: str) -> str:
    return punctuation(word(text)).upper()


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def decomposed_and_punctuation(text: str) -> str:
    return decomposed(text) + " !!"


def other_label(row: dict) -> None:
    row["class"] = LABELS[(LABELS.index(row["class"]) + 1) % 3]


def other_reply(row: dict) -> None:
    row["reply"] = "No."


def other_output(row: dict) -> None:
    row["output"] = "No."


def other_last_message(row: dict) -> None:
    row["messages"][-1]["content"] = "No."


# Edited texts are only similar if they are long, and not every text can be edited.
LONG: dict[str, Any] = {"flavours": (prose, russian)}
SPACED: dict[str, Any] = {"flavours": (prose, code)}
ACCENTED: dict[str, Any] = {"flavours": (european,)}
TO_VALIDATION: dict[str, Any] = {"between": ("train", "validation")}
FROM_VALIDATION: dict[str, Any] = {"between": ("validation", "test")}

COPIES = [
    copied("text-duplicate", "text", "jsonl", "duplicate"),
    copied("labelled-duplicate", "labelled", "csv", "duplicate"),
    copied("completion-duplicate", "completion", "parquet", "duplicate"),
    copied("instruction-duplicate", "instruction", "csv", "duplicate"),
    copied("chat-duplicate", "chat", "parquet", "duplicate"),
    copied("sharegpt-duplicate", "sharegpt", "jsonl", "duplicate"),
    copied("duplicate-whitespace", "labelled", "parquet", "duplicate", whitespace, **SPACED),
    copied("duplicate-decomposed", "labelled", "parquet", "duplicate", decomposed, **ACCENTED),
    copied("text-leak", "text", "csv", "leak"),
    copied("labelled-leak", "labelled", "jsonl", "leak"),
    copied("completion-leak", "completion", "csv", "leak"),
    copied("instruction-leak", "instruction", "jsonl", "leak"),
    copied("chat-leak", "chat", "jsonl", "leak"),
    copied("sharegpt-leak", "sharegpt", "parquet", "leak"),
    copied("leak-whitespace", "labelled", "jsonl", "leak", whitespace, **SPACED),
    copied("leak-decomposed", "completion", "jsonl", "leak", decomposed, **ACCENTED),
    copied("leak-train-validation", "labelled", "jsonl", "leak", **TO_VALIDATION),
    copied("leak-validation-test", "labelled", "parquet", "leak", **FROM_VALIDATION),
    copied("text-near-leak", "text", "csv", "near_leak", three_edits, **LONG),
    copied("labelled-near-leak", "labelled", "jsonl", "near_leak", three_edits, **LONG),
    copied("completion-near-leak", "completion", "csv", "near_leak", three_edits, **LONG),
    copied("instruction-near-leak", "instruction", "parquet", "near_leak", three_edits, **LONG),
    copied("chat-near-leak", "chat", "parquet", "near_leak", three_edits, **LONG),
    copied("sharegpt-near-leak", "sharegpt", "jsonl", "near_leak", three_edits, **LONG),
    copied("near-leak-case", "labelled", "csv", "near_leak", str.swapcase, **LONG),
    copied("near-leak-punctuation", "labelled", "parquet", "near_leak", punctuation, **LONG),
    copied("near-leak-word", "labelled", "csv", "near_leak", word, **LONG),
    copied(
        "near-leak-decomposed-and-punctuation",
        "labelled",
        "parquet",
        "near_leak",
        decomposed_and_punctuation,
        **ACCENTED,
    ),
    copied(
        "near-leak-train-validation",
        "text",
        "csv",
        "near_leak",
        three_edits,
        **TO_VALIDATION,
        **LONG,
    ),
    copied(
        "near-leak-validation-test",
        "text",
        "parquet",
        "near_leak",
        three_edits,
        **FROM_VALIDATION,
        **LONG,
    ),
]

NEAR_DUPLICATES = [
    warned("near-duplicate-case", "parquet", str.swapcase, **LONG),
    warned("near-duplicate-punctuation", "jsonl", punctuation, **LONG),
    warned("near-duplicate-word", "csv", word, **LONG),
    warned("near-duplicate-three-edits", "parquet", three_edits, **LONG),
    warned(
        "near-duplicate-decomposed-and-punctuation",
        "parquet",
        decomposed_and_punctuation,
        **ACCENTED,
    ),
]

POLICIES = [
    copied(
        "near-duplicate-dropped",
        "completion",
        "parquet",
        "near_duplicate",
        three_edits,
        params={"on_near_duplicate": "drop"},
        **LONG,
    ),
    copied("leak-warned", "labelled", "parquet", "leak", dropped=False, params={"on_leak": "warn"}),
    copied(
        "leak-error",
        "labelled",
        "jsonl",
        "leak",
        dropped=False,
        params={"on_leak": "error"},
        problem="identical texts are in two splits (4 in train and test)",
    ),
    copied(
        "near-leak-error",
        "labelled",
        "parquet",
        "near_leak",
        three_edits,
        dropped=False,
        params={"on_leak": "error"},
        problem="near-duplicate texts are in two splits (4",
        **LONG,
    ),
]

CONFLICTS = [
    answered_twice("conflicting-labels", "labelled", "csv", other_label),
    answered_twice("conflicting-completions", "completion", "jsonl", other_reply),
    answered_twice("conflicting-outputs", "instruction", "jsonl", other_output),
    answered_twice("conflicting-last-messages", "chat", "parquet", other_last_message),
]

RELATIONS = [*COPIES, *NEAR_DUPLICATES, *POLICIES, *CONFLICTS]
