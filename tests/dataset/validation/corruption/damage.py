"""What a kind of damage is: what it does to which rows, and what must be found for it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.dataset.validation.corruption.shapes import SHAPES, SIZES, Dataset, Place
from tests.dataset.validation.corruption.texts import FLAVOURS

ALL = "csv jsonl parquet"

# What each check says of a row, or how that begins; the tables say it where it differs.
REASONS = {
    "missing": "is missing",
    "empty": "is empty or only whitespace",
    "undecodable": "holds bytes that are not UTF-8",
    "nul": "holds a NUL character",
    "replacement": "holds U+FFFD",
    "unknown_label": "is none of data.labels",
    "unseen_label": "is in no row of train",
    "duplicate": "is the same as",
    "leak": "is the same as",
    "near_duplicate": "is nearly the same as",
    "near_leak": "is nearly the same as",
    "conflict": "has 2 different answers: ",
    "mojibake": "looks like UTF-8 read as another encoding",
    "special_token": "holds the name of a special token",
    "truncated": "tokens at its end",
}
# Rows with these findings are used all the same.
KEPT = ("mojibake", "html", "control", "special_token", "truncated")


@dataclass(frozen=True)
class Found:
    """A finding that damage must lead to; `reason` is part of what it says."""

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
        formats: those that it is tried in.
        do: damages a dataset at the places given, and returns all that must be found.
        params: what differs from the params of the shape.
        problem: part of the only line that refuses the dataset, if any does.
        flavours: the kinds of text that it can be done to.
    """

    name: str
    shape: str
    formats: str
    do: Callable[[Dataset, list[Place]], list[Found]]
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


def row(
    name: str,
    shape: str,
    formats: str,
    change: Callable[[Dataset, Place], None],
    check: str,
    column: str,
    reason: str = "",
    **more: Any,
) -> Damage:
    """Return a kind that changes each row by itself, in which one check finds it."""

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        for place in places:
            change(dataset, place)
        said = reason or REASONS[check]
        return [Found(place, check, column, said, check not in KEPT) for place in places]

    return Damage(name, shape, formats, do, **more)


def text(
    name: str,
    shape: str,
    formats: str,
    edit: Callable[[str], Any],
    check: str,
    reason: str = "",
    **more: Any,
) -> Damage:
    """Return a kind that changes the text of each row."""

    def change(dataset: Dataset, place: Place) -> None:
        before = dataset.text(place)
        dataset.put(place, edit(before))
        assert dataset.text(place) != before

    return row(name, shape, formats, change, check, SHAPES[shape].column, reason, **more)


def cell(
    name: str,
    shape: str,
    formats: str,
    column: str,
    value: Any,
    check: str,
    reason: str = "",
    **more: Any,
) -> Damage:
    """Return a kind that puts a value in a column, or takes the column away (`...`)."""

    def change(dataset: Dataset, place: Place) -> None:
        if value is ...:
            del dataset.row(place)[column]
        else:
            dataset.row(place)[column] = value

    return row(name, shape, formats, change, check, column, reason, **more)
