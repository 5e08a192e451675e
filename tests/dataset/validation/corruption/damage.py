"""Define kinds of damage: the rows they change, the change and the expected findings."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.dataset.validation.corruption.shapes import SHAPES, SIZES, Dataset, Place
from tests.dataset.validation.corruption.texts import FLAVOURS

ALL = "csv jsonl parquet"

# The reason of each check or its beginning; the tables of kinds override it.
REASONS = {
    "missing": "is missing",
    "empty": "is empty or only whitespace",
    "undecodable": "contains bytes that are not UTF-8",
    "nul": "contains a NUL character",
    "replacement": "contains U+FFFD",
    "unknown_label": "is not in data.labels",
    "unseen_label": "does not occur in train",
    "duplicate": "is the same as",
    "leak": "is the same as",
    "near_duplicate": "is nearly the same as",
    "near_leak": "is nearly the same as",
    "conflict": "has 2 different answers: ",
    "mojibake": "looks like UTF-8 decoded with another encoding",
    "special_token": "contains the name of a special token",
    "truncated": "is truncated by ",
}
# Rows with these findings are kept.
KEPT = ("mojibake", "html", "control", "special_token", "truncated", "unanswered")


@dataclass(frozen=True)
class Found:
    """An expected finding; `reason` is a part of its reason."""

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
        formats: the file formats to test it in.
        do: damages a dataset at the given places and returns all expected findings.
        params: overrides of the params of the shape.
        problem: a part of the only expected problem; null if none is expected.
        flavours: the kinds of text that it applies to.
    """

    name: str
    shape: str
    formats: str
    do: Callable[[Dataset, list[Place]], list[Found]]
    params: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    flavours: tuple[Callable, ...] = FLAVOURS

    def places(self, suffix: str) -> list[Place]:
        """Return rows to damage: four in train, one per other split, none of the last four rows."""
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
    """Return a kind that changes each row on its own and leads to one finding per row."""

    def do(dataset: Dataset, places: list[Place]) -> list[Found]:
        for place in places:
            change(dataset, place)
        expected = reason or REASONS[check]
        return [Found(place, check, column, expected, check not in KEPT) for place in places]

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
    """Return a kind that sets a column to a value, or removes the column (`...`)."""

    def change(dataset: Dataset, place: Place) -> None:
        if value is ...:
            del dataset.row(place)[column]
        else:
            dataset.row(place)[column] = value

    return row(name, shape, formats, change, check, column, reason, **more)
