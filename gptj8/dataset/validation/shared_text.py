"""Find what rows have in common, so that they are compared by what is particular to each.

Rows that share an instruction, a system message or the words around a field are not alike for that
reason. Template literals are never compared. Lines that recur in many rows are left out, as is the
text that all rows begin or end with. A row that has nothing else is compared as a whole.
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
_LEAST_FRACTION = 0.01
_SHORTEST_END = 20  # characters


@dataclass(frozen=True)
class SharedText:
    """What many rows of a dataset have in common.

    Attributes:
        lines: lines, without the white space around them.
        beginning, end: what every row begins and ends with.
    """

    lines: frozenset[str] = field(default=frozenset(), repr=False)
    beginning: str = ""
    end: str = ""

    @classmethod
    def of(cls, rows: Iterable[Sequence[str]]) -> SharedText:
        """Find what rows share.

        Args:
            rows: the texts of each row, from `texts_of_rows`.
        """
        known = list(rows)
        counts = Counter(line for texts in known for line in {*_lines(texts)})
        least = max(_LEAST_ROWS, _LEAST_FRACTION * len(known))
        lines = frozenset(line for line, count in counts.items() if count >= least)
        if len(known) < _LEAST_ROWS:
            return cls(lines)
        joined = ["\n".join(texts) for texts in known]
        beginning = _common_beginning(joined)
        end = _common_beginning([text[::-1] for text in joined])[::-1]
        return cls(
            lines,
            beginning if len(beginning) >= _SHORTEST_END else "",
            end if len(end) >= _SHORTEST_END else "",
        )

    def particular(self, texts: Sequence[str]) -> str:
        """Return what is particular to a row."""
        text = "\n".join(texts)
        if not (self.lines or self.beginning or self.end):
            return text
        start = len(self.beginning) if text.startswith(self.beginning) else 0
        end = len(text) - (len(self.end) if text.endswith(self.end) else 0)
        lines = _lines([text[start : max(start, end)]])
        return "\n".join(line for line in lines if line not in self.lines) or text


def texts_of_rows(fields: pd.DataFrame, rows: pd.DataFrame, shape: Shape) -> list[list[str]]:
    """Return the texts of each row that are compared: the cells, or the messages before the answer.

    Args:
        fields: rows with the task's fields, and `conversation` if they are conversations.
        rows: the rows as they were read, with the same index.
        shape: the shape of the rows.
    """
    if shape.is_conversation:
        return [_messages(cell) for cell in fields["conversation"]]
    if shape.template is None or len(shape.template.fields) == 1:
        return [[text] for text in fields[shape.input]]
    cells = rows.loc[fields.index, list(shape.template.fields)]
    return [
        [cell for cell in row if isinstance(cell, str) and cell.strip()]
        for row in cells.itertuples(index=False, name=None)
    ]


def _messages(conversation: str) -> list[str]:
    *before, _ = json.loads(conversation)["messages"]
    return [text for message in before if isinstance(text := message.get("content"), str) and text]


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all others are between them
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(one for one, _ in pairs)


def _lines(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for part in text.split("\n") if (line := part.strip())]
