"""Find what rows have in common, so that they are compared by what is particular to each.

Rows that share an instruction, a system message or the words around a field are not alike for that
reason. Template literals are never compared. Columns that hardly vary, messages that recur, lines
that very many rows have, and the text that all rows begin or end with are left out. A row that has
nothing else is compared as a whole.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from gptj8.dataset.readers.row_shapes import Shape

_LEAST_ROWS = 10
_MESSAGE_FRACTION = 0.01  # of the rows that have a message that recurs
_LINE_FRACTION = 0.2  # of the rows that have a line; copies of one text are fewer
_DISTINCT_FRACTION = 0.05  # most values of a column that hardly varies, per row
_SHORTEST_END = 20  # characters


@dataclass(frozen=True)
class SharedText:
    """What many rows of a dataset have in common.

    Attributes:
        parts: columns that hardly vary, by their place in a row.
        messages: messages that recur.
        lines: lines, without the white space around them.
        beginning, end: what every row begins and ends with.
    """

    parts: frozenset[int] = frozenset()
    messages: frozenset[str] = field(default=frozenset(), repr=False)
    lines: frozenset[str] = field(default=frozenset(), repr=False)
    beginning: str = ""
    end: str = ""

    @classmethod
    def of(cls, rows: Iterable[Sequence[str]], are_messages: bool = False) -> SharedText:
        """Find what rows share.

        Args:
            rows: the texts of each row, from `texts_of_rows`.
            are_messages: whether the texts are messages, and not the cells of columns.
        """
        known = list(rows)
        if len(known) < _LEAST_ROWS:
            return cls()
        parts: frozenset[int] = frozenset()
        messages: frozenset[str] = frozenset()
        if are_messages:
            counts = Counter(text for texts in known for text in set(texts))
            messages = _frequent(counts, _MESSAGE_FRACTION * len(known))
        elif len(known[0]) > 1:
            distinct = [len(set(column)) for column in zip(*known, strict=True)]
            most = max(1, _DISTINCT_FRACTION * len(known))
            parts = frozenset(i for i, count in enumerate(distinct) if count <= most)
        found = cls(parts, messages)
        left = [found._left(texts) for texts in known]
        counts = Counter(line for texts in left for line in {*_lines(texts)})
        joined = ["\n".join(texts) for texts in left]
        beginning = _common_beginning(joined)
        end = _common_beginning([text[::-1] for text in joined])[::-1]
        return cls(
            parts,
            messages,
            _frequent(counts, _LINE_FRACTION * len(known)),
            beginning if len(beginning) >= _SHORTEST_END else "",
            end if len(end) >= _SHORTEST_END else "",
        )

    def particular(self, texts: Sequence[str]) -> str:
        """Return what is particular to a row."""
        if self == _NOTHING:
            return "\n".join(texts)
        text = "\n".join(self._left(texts))
        start = len(self.beginning) if text.startswith(self.beginning) else 0
        end = len(text) - (len(self.end) if text.endswith(self.end) else 0)
        lines = _lines([text[start : max(start, end)]])
        return "\n".join(line for line in lines if line not in self.lines) or "\n".join(texts)

    def _left(self, texts: Sequence[str]) -> list[str]:
        return [
            text
            for place, text in enumerate(texts)
            if place not in self.parts and text not in self.messages
        ]


_NOTHING = SharedText()


def texts_of_rows(fields: pd.DataFrame, rows: pd.DataFrame, shape: Shape) -> list[list[str]]:
    """Return the texts of each row that are compared: the cells, or the messages before the answer.

    Args:
        fields: rows with the task's fields, and `conversation` if they are conversations.
        rows: the same rows, as they were read.
        shape: the shape of the rows.
    """
    if shape.is_conversation:
        return [_messages(cell) for cell in fields["conversation"]]
    if shape.template is None or len(shape.template.fields) == 1:
        return [[text] for text in fields[shape.input]]
    cells = rows.loc[fields.index, list(shape.template.fields)]
    return [
        [cell if isinstance(cell, str) else "" for cell in row]
        for row in cells.itertuples(index=False, name=None)
    ]


def _messages(conversation: str) -> list[str]:
    *before, _ = json.loads(conversation)["messages"]
    return [text for message in before if isinstance(text := message.get("content"), str) and text]


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all others are between them
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(one for one, _ in pairs)


def _frequent(counts: Counter[str], least: float) -> frozenset[str]:
    least = max(_LEAST_ROWS, least)
    return frozenset(text for text, count in counts.items() if count >= least)


def _lines(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for part in text.split("\n") if (line := part.strip())]
