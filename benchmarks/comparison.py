"""The figures of `benchmarks.compare` and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "gptj8"

Figure = float | str  # a reason instead of a number


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        machine: the CPU or GPU, its ISA and the number of threads.
        dtype: dtype that systems with a choice compute in.
        figures: per system and kind of work, one figure per round.
        about: per system, versions and what it says about the ISA.
        notes: what the reader must know, such as systems that could not be limited.
    """

    machine: str
    dtype: str
    figures: dict[str, dict[str, list[Figure]]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, system: str, work: str, figure: Figure) -> None:
        """Add the figure of a round."""
        self.figures.setdefault(system, {}).setdefault(work, []).append(figure)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        return dict(vars(self))

    def report(self, title: str) -> list[str]:
        """Return Markdown: the table, and below it notes and what each system is."""
        lines = [f"{title}; {self.machine}; {self.dtype} where a system has a choice; medians", ""]
        lines += [*table(self.figures), ""]
        if OURS in self.figures and len(self.figures) > 1:
            lines += [f"In brackets: {OURS} as a multiple, the median of the rounds' ratios.", ""]
        for system, found in self.about.items():
            lines.append(f"- {system}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
        return lines + [f"- {note}" for note in self.notes]


def table(figures: Mapping[str, Mapping[str, Sequence[Figure]]]) -> list[str]:
    """Return a Markdown table with a row per kind of work and a column per system."""
    works = list(dict.fromkeys(work for rows in figures.values() for work in rows))
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for work in works:
        ours = figures.get(OURS, {}).get(work, ())
        cells = []
        for system, rows in figures.items():
            theirs = rows.get(work, ())
            cell = _number(theirs)
            if system != OURS and (multiple := _ratio(ours, theirs)):
                cell += f" ({multiple:.2f}x)"
            cells.append(cell)
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return lines


def _number(values: Sequence[Figure]) -> str:
    """Return the median; a reason only if there is no number."""
    numbers = [value for value in values if not isinstance(value, str)]
    if numbers:
        return f"{statistics.median(numbers):,.3g}"
    return str(values[0]).replace("|", "/") if values else "-"


def _ratio(ours: Sequence[Figure], theirs: Sequence[Figure]) -> float | None:
    """Return the median ratio of the rounds in which both have a number."""
    ratios = [
        a / b
        for a, b in zip(ours, theirs, strict=False)
        if not isinstance(a, str) and not isinstance(b, str) and b
    ]
    return statistics.median(ratios) if ratios else None
