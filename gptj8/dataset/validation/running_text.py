"""Running text whose rows continue each other, such as the paragraphs of a book.

Such rows are parts of a document. They are tokenized as within it, have no border between them in
the training text unless a row between them is missing, and are not duplicates of each other: verse
and dialogue repeat themselves. Whole documents may be. Held-out text is whole documents if there
are many, otherwise parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from gptj8.dataset.prepared.text_encoder import TextEncoder

MANY_DOCUMENTS = 20
"""From this number on, documents are held out as a whole."""

BRIEF = 100
"""Characters of a part below which it may recur anywhere, such as `Enter the king.`"""

_BEFORE, _AFTER = "\n", "a"
"""What stands for the neighbors of a part when it is tokenized."""


def encode_parts(
    encoder: TextEncoder, texts: Sequence[str], continues: np.ndarray, continued: np.ndarray
) -> list[list[int]]:
    """Return the ids of texts, without prefix or end-of-text token.

    Args:
        encoder: the tokenizer.
        texts: the texts.
        continues: (texts,) whether a text continues another one.
        continued: (texts,) whether another text continues it.
    """
    if not (continues.any() or continued.any()):
        return encoder.encode_batch(texts)
    around = [
        (_BEFORE if first else "") + text + (_AFTER if last else "")
        for text, first, last in zip(texts, continues, continued, strict=True)
    ]
    found = []
    for text, whole, encoded, first in zip(
        texts, around, encoder.tokenize(around), continues, strict=True
    ):
        offset = len(_BEFORE) if first else 0
        start = encoded.token_at(offset) if offset else 0
        has_border = not offset or (start > 0 and encoded.end_of(start - 1) == offset)
        end = len(encoded.ids)
        if len(whole) > offset + len(text):
            end = encoded.token_at(offset + len(text))
            has_border = has_border and end > 0 and encoded.end_of(end - 1) == offset + len(text)
        found.append(encoded.ids[start:end] if has_border else encoder.encode(text))
    return found


def follows(rows: pd.DataFrame, previous: tuple[str, int] | None) -> np.ndarray:
    """Return whether each row continues the row before it.

    Args:
        rows: `file`, `row` and `next_row`, in order.
        previous: the file and the `next_row` of the row before the first one.
    """
    files, next_rows = rows["file"].to_numpy(), rows["next_row"].to_numpy()
    found = np.zeros(len(rows), dtype=bool)
    if len(rows):
        found[1:] = (files[1:] == files[:-1]) & (rows["row"].to_numpy()[1:] == next_rows[:-1])
        found[0] = previous == (files[0], rows["row"].iloc[0])
    return found


def with_borders(
    rows: pa.RecordBatch,
    begins: np.ndarray,
    ends: np.ndarray,
    prefix_ids: Sequence[int],
    eos_id: int,
) -> pa.RecordBatch:
    """Return rows with the tokens that begin and end a text.

    Args:
        rows: rows of running text, each with one example in `input_ids`.
        begins, ends: (rows,) whether a text begins and ends at a row.
        prefix_ids, eos_id: of the tokenizer.
    """
    examples = rows.column("input_ids").flatten()
    lengths = examples.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # In the order of the text: what begins a row, then what ends it.
    places = np.stack([*[offsets[:-1]] * len(prefix_ids), offsets[1:]], axis=1)
    tokens = np.broadcast_to([*prefix_ids, eos_id], places.shape)
    used = np.stack([*[begins] * len(prefix_ids), ends], axis=1)
    ids = np.insert(examples.flatten().to_numpy(), places[used], tokens[used])
    lengths = lengths + used.sum(axis=1)
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    new = pa.LargeListArray.from_arrays(starts, pa.array(ids, pa.int32()))
    each = pa.array(np.arange(len(lengths) + 1), pa.int64())
    found = {name: rows.column(name) for name in rows.schema.names}
    found["input_ids"] = pa.LargeListArray.from_arrays(each, new)
    found["tokens"] = pa.array(lengths, pa.int32())
    return pa.RecordBatch.from_pydict(found)


class Parts:
    """The documents of a dataset, by row.

    Attributes:
        follows: (rows,) whether the row continues the one before.
        are_parts: (rows,) whether the row is a part of a document with several.
        document: (rows,) the number of the row's document.
    """

    def __init__(self, follows: np.ndarray) -> None:
        self.follows = follows
        self.are_parts = follows.copy()
        self.are_parts[:-1] |= follows[1:]
        self.document = np.cumsum(~follows) - 1

    @property
    def _starts(self) -> np.ndarray:
        """The first row of each document, and the number of rows."""
        return np.append(np.flatnonzero(~self.follows), len(self.follows))

    def duplicates(self, found: pd.DataFrame, is_compared: np.ndarray) -> pd.DataFrame:
        """Return the duplicates that are not parts, and documents whose parts are all duplicates.

        Args:
            found: `index` and `other` of rows that equal an earlier one.
            is_compared: (rows,) whether the row was compared.
        """
        whole = found[~self.are_parts[found["index"]]]
        starts = self._starts
        pairs = found.assign(
            document=self.document[found["index"]], original=self.document[found["other"]]
        )
        counts = pairs.groupby(["document", "original"]).size()
        compared = np.bincount(self.document[is_compared], minlength=len(starts) - 1)
        copies = [whole]
        for (document, original), count in counts.items():
            rows = np.arange(starts[document], starts[document + 1])
            others = np.arange(starts[original], starts[original + 1])
            if len(rows) == len(others) > 1 and count == compared[document] == compared[original]:
                copies.append(pd.DataFrame({"index": rows, "other": others}))
        return pd.concat(copies, ignore_index=True)

    def edges(self, equal: pd.DataFrame, pairs: np.ndarray) -> np.ndarray:
        """Return the pairs of rows that are held out together, (pairs, 2).

        Few documents are divided, so these are equal and similar rows. Of many, these are the rows
        of a document, and documents of which half of the parts are equal or similar.

        Args:
            equal: `index` and `group` of equal rows.
            pairs: (pairs, 2) similar rows.
        """
        first = equal.groupby("group")["index"].transform("first").to_numpy(np.int64)
        alike = np.stack([first, equal["index"].to_numpy(np.int64)], axis=1)
        alike = np.concatenate([alike, pairs])
        rows = np.flatnonzero(self.follows)
        if not len(rows) or self.document[-1] + 1 < MANY_DOCUMENTS:
            return alike
        documents = np.sort(self.document[alike], axis=1)
        documents = documents[documents[:, 0] != documents[:, 1]]
        found, counts = np.unique(documents, axis=0, return_counts=True)
        sizes = np.bincount(self.document)
        found = found[2 * counts >= sizes[found].min(axis=1)] if len(found) else found
        inside = np.stack([rows - 1, rows], axis=1)
        return np.concatenate([inside, self._starts[found].reshape(-1, 2)])

    def borders(
        self, kept: np.ndarray, split: np.ndarray, copies: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return whether a text begins and ends at each row, in the text of its split.

        Args:
            kept: (rows,) whether the row is used.
            split: (rows,) the row's split.
            copies: (rows,) how often the row is used; None: once.
        """
        joined = self.follows.copy()
        joined[1:] &= kept[1:] & kept[:-1] & (split[1:] == split[:-1])
        if copies is not None:
            joined[1:] &= (copies[1:] == 1) & (copies[:-1] == 1)
        ends = np.ones(len(joined), dtype=bool)
        ends[:-1] = ~joined[1:]
        return ~joined, ends
