"""Collect findings: all of them on disk, counts and a few examples in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.validation.checks import CHECKS

COLUMNS = ("split", "file", "row", "check", "column", "value", "reason", "dropped")
OTHER_COLUMNS = ("other_file", "other_row", "other_value")
"""The related row of a relation; null for other findings."""

EXAMPLES = 20

_SCHEMA = pa.schema(
    [
        (
            name,
            {"row": pa.int64(), "dropped": pa.bool_(), "other_row": pa.int64()}.get(
                name, pa.large_string()
            ),
        )
        for name in (*COLUMNS, *OTHER_COLUMNS)
    ]
)


class Findings:
    """All findings, in the order in which they are added.

    Attributes:
        path: a Parquet file with the columns `split`, `file`, `row`, `check`, the user's `column`,
            `value`, `reason`, `dropped` (whether the finding dropped the row) and `other_*`.
        examples: the first `EXAMPLES` findings per check.
        dropped_rows: the number of dropped rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.examples: dict[str, pd.DataFrame] = {}
        self.dropped_rows = 0
        self._rows: Counter[tuple[str, str]] = Counter()
        self._dropped: Counter[str] = Counter()
        self._writer: pq.ParquetWriter | None = None

    def add(self, found: pd.DataFrame) -> None:
        """Add findings; all findings of one row and check must be in one call.

        Args:
            found: a frame with the columns of `path`; the `other_*` columns are optional.
        """
        if found.empty:
            return
        found = found.reindex(columns=[*COLUMNS, *OTHER_COLUMNS])
        rows = found.drop_duplicates(["check", "file", "row"])
        for (check, split), count in rows.groupby(["check", "split"]).size().items():
            self._rows[check, split] += int(count)
        dropped = rows[rows["dropped"].astype(bool)]
        self._dropped.update(dropped["check"].value_counts().to_dict())
        self.dropped_rows += len(dropped.drop_duplicates(["file", "row"]))
        for check, part in found.groupby("check"):
            known = self.examples.get(check)
            if known is None:
                self.examples[check] = part.head(EXAMPLES)
            elif len(known) < EXAMPLES:
                self.examples[check] = pd.concat([known, part.head(EXAMPLES - len(known))])
        self._write(found)

    def count(self, *checks: str, split: str | None = None) -> int:
        """Return the number of rows with a finding, summed over the checks."""
        return sum(
            count
            for (check, part), count in self._rows.items()
            if check in checks and split in (None, part)
        )

    def dropped(self, check: str) -> int:
        """Return the number of rows that a check dropped."""
        return self._dropped[check]

    def checks(self) -> list[str]:
        """Return the checks with findings, in the order of `CHECKS`."""
        return [name for name in CHECKS if self.count(name)]

    def frame(self) -> pd.DataFrame:
        """Return all findings."""
        self.close()
        return pq.read_table(self.path).to_pandas()

    def close(self) -> None:
        """Complete and close the file."""
        if self._writer is None and not self.path.exists():
            self._write(pd.DataFrame(columns=_SCHEMA.names))
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, found: pd.DataFrame) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, _SCHEMA, compression="zstd")
        table = pa.Table.from_pandas(found, schema=_SCHEMA, preserve_index=False)
        self._writer.write_table(table.replace_schema_metadata(None))


def copy_dropped(source: str | Path, target: str | Path) -> None:
    """Copy the findings that dropped a row from `source` to `target`."""
    with (
        pq.ParquetFile(source) as file,
        pq.ParquetWriter(target, _SCHEMA, compression="zstd") as out,
    ):
        for batch in file.iter_batches():
            out.write_batch(batch.filter(batch.column("dropped")))
