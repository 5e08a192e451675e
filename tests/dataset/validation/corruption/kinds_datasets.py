"""Kinds of damage that make a dataset unusable: bad labels and too many invalid rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from tests.dataset.validation.corruption.damage import REASONS, Damage, Found
from tests.dataset.validation.corruption.shapes import LABELS, SIZES, Dataset, Place


def respelled(name: str, formats: str, spelling: str) -> Damage:
    """Return a kind in which some rows of train use another spelling of a label."""

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        rows = [place for place in places if place[0] == "train"]
        for place in rows:
            dataset.row(place)["class"] = spelling
        reason = f"differs only in spelling from {LABELS[1]!r}, which more rows have"
        return [Found(place, "label_case", "class", reason, False) for place in rows]

    return Damage(name, "labelled", formats, do, problem="differ only in")


def unseen(dataset: Dataset, places: list[Place]) -> list[Found]:
    rows = [place for place in places if place[0] == "test"]
    for place in rows:
        dataset.row(place)["class"] = "prima"
    return [Found(p, "unseen_label", "class", REASONS["unseen_label"], False) for p in rows]


def one_label(split: str) -> Callable[[Dataset, list[Place]], list[Found]]:
    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        for row in dataset.rows[split]:
            row["class"] = LABELS[0]
        return []

    return do


def emptied(dataset: Dataset, places: list[Place]) -> list[Found]:
    for place in places:
        dataset.put(place, "")
    column = {"text": "body", "completion": "question"}[dataset.shape]
    return [Found(place, "empty", column, REASONS["empty"], True) for place in places]


def validation_emptied(dataset: Dataset, places: list[Place]) -> list[Found]:
    return emptied(dataset, [("validation", n) for n in range(1, SIZES["validation"] + 1)])


DATASETS = [
    respelled("label-other-case", "jsonl", LABELS[1].upper()),
    respelled("label-other-space", "jsonl", LABELS[1].replace(" ", "  ")),
    respelled("label-other-no-break-space", "parquet", LABELS[1].replace(" ", "\xa0")),
    respelled("label-other-decomposed", "parquet", unicodedata.normalize("NFD", LABELS[1])),
    Damage(
        "label-unseen-in-train",
        "labelled",
        "csv",
        unseen,
        problem="labels in test that are missing from train: 'prima'",
    ),
    Damage(
        "one-label-in-validation",
        "labelled",
        "jsonl",
        one_label("validation"),
        problem="the validation split has only one label, 'sehr gut'",
    ),
    Damage(
        "one-label-in-test",
        "labelled",
        "csv",
        one_label("test"),
        problem="the test split has only one label, 'sehr gut'",
    ),
    Damage(
        "no-valid-row-in-validation",
        "completion",
        "csv",
        validation_emptied,
        params={"max_invalid_fraction": 1.0},
        problem="the validation split has no rows left",
    ),
    Damage(
        "too-many-invalid",
        "text",
        "jsonl",
        emptied,
        params={"max_invalid_fraction": 0.05},
        problem="invalid rows: 6 of 108, more in train than data.max_invalid_fraction = 0.05",
    ),
    Damage(
        "on-invalid-error",
        "text",
        "jsonl",
        emptied,
        params={"on_invalid": "error"},
        problem="invalid rows: 6 of 108, data.on_invalid = error",
    ),
]
