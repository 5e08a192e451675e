"""Store rows on disk while they are checked: written once, in order, then read by the checks.

A dataset may be many times larger than memory. Checks across rows need only a few bytes per row
(facts), so each fact is a column in its own file, and only one or two columns are in memory at
once. The rows themselves are read again only to write or report them. Files are read without
memory maps, because mapped pages count as memory of this process.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa


class RowStore:
    """A table of rows with facts and a normalized text per row.

    Call `append` for all rows, then `finish`, then read.

    Attributes:
        size: the number of rows appended.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True)
        self.size = 0
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._writer: pa.RecordBatchFileWriter | None = None
        self._sink: pa.NativeFile | None = None
        self._starts: list[int] = []
        self._text_end = 0
        self._text_ends: np.ndarray | None = None
        self._texts = -1
        self._reader: pa.RecordBatchFileReader | None = None

    def append(
        self, rows: pa.RecordBatch, facts: Mapping[str, np.ndarray], normalized: list[str]
    ) -> None:
        """Append rows, with one value per row in each fact and one normalized text per row."""
        if not rows.num_rows:
            return
        if self._writer is None:
            self._sink = pa.OSFile(str(self.directory / "rows.arrow"), "wb")
            self._writer = pa.ipc.new_file(self._sink, rows.schema)
        self._starts.append(self.size)
        self._writer.write_batch(rows)
        self.add_facts(facts)
        encoded = [text.encode() for text in normalized]
        ends = self._text_end + np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._file("texts").write(b"".join(encoded))
        self._file("text_ends").write(ends.tobytes())
        self._text_end = int(ends[-1])
        self.size += rows.num_rows

    def add_facts(self, facts: Mapping[str, np.ndarray]) -> None:
        """Append values of facts, for the next rows that have no value of that fact."""
        for name, values in facts.items():
            self._dtypes.setdefault(name, values.dtype)
            self._file(name).write(np.ascontiguousarray(values, self._dtypes[name]).tobytes())

    def finish(self) -> None:
        """Close the files that were written."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None

    def fact(self, name: str) -> np.ndarray:
        """Return the values of one fact for all rows."""
        return np.fromfile(self.directory / name, dtype=self._dtypes[name])

    def normalized_lengths(self) -> np.ndarray:
        """Return the size of each row's normalized text in bytes."""
        return np.diff(np.fromfile(self.directory / "text_ends", dtype=np.int64), prepend=0)

    def normalized(self, index: int) -> str:
        """Return the normalized text of one row."""
        return self.normalized_between(index, index + 1)[0]

    def normalized_between(self, start: int, end: int) -> list[str]:
        """Return the normalized texts of the rows from `start` to `end` (exclusive)."""
        if self._text_ends is None:
            self._text_ends = np.fromfile(self.directory / "text_ends", dtype=np.int64)
            self._texts = os.open(self.directory / "texts", os.O_RDONLY)
        begin = int(self._text_ends[start - 1]) if start else 0
        ends = (self._text_ends[start:end] - begin).tolist()
        content = os.pread(self._texts, ends[-1], begin)
        return [content[a:b].decode() for a, b in itertools.pairwise([0, *ends])]

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the batches as they were appended, each after the index of its first row."""
        reader = self._open()
        for number, start in enumerate(self._starts):
            yield start, reader.get_batch(number)

    def rows(self, indices: np.ndarray, columns: list[str]) -> pd.DataFrame:
        """Return rows by index, in the order of `indices`."""
        reader = self._open()
        order = np.argsort(indices, kind="stable")
        batch_of = np.searchsorted(self._starts, indices[order], side="right") - 1
        parts = []
        for number in np.unique(batch_of):
            wanted = indices[order][batch_of == number] - self._starts[number]
            parts.append(reader.get_batch(int(number)).select(columns).take(pa.array(wanted)))
        table = pa.Table.from_batches(parts, reader.schema.empty_table().select(columns).schema)
        found = table.to_pandas()
        back = np.empty(len(indices), dtype=np.int64)
        back[order] = np.arange(len(indices))
        return found.iloc[back].reset_index(drop=True)

    def close(self) -> None:
        """Finish, and close the files that are read."""
        self.finish()
        if self._texts >= 0:
            os.close(self._texts)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = open(self.directory / name, "wb")
        return self._files[name]

    def _open(self) -> pa.RecordBatchFileReader:
        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.OSFile(str(self.directory / "rows.arrow"), "rb"))
        return self._reader
