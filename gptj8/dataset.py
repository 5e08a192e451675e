"""The prepared dataset on disk: what `validate` leaves and every later stage begins with.

Kept apart from the reading and checking of a user's files (`gptj8.sources`, `gptj8.validation`), so
that an edit there does not make DVC train again what has not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.errors import UserError
from gptj8.files import read_json, replace_directory, write_json

SPLITS = ("train", "validation", "test")
FIELDS = {
    "classification": ("text", "label"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class PreparedDataset:
    """What `validate` leaves for the later stages.

    Attributes:
        directory: where it lies.
        task: `classification`, `completion` or `text`.
        labels: sorted; empty unless the task is classification.
        rows: the number of rows of each split.
    """

    directory: Path
    task: str
    labels: tuple[str, ...]
    rows: Mapping[str, int]

    def split(self, name: str) -> pd.DataFrame:
        """Return a split: the task's fields, `file` and `row`, in the order of the source."""
        if name not in SPLITS:
            raise ValueError(f"{name!r} is not one of {', '.join(SPLITS)}")
        path = self.directory / f"{name}.parquet"
        try:
            return pq.read_table(path).to_pandas()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def load_prepared(directory: str | Path) -> PreparedDataset:
    """Open the directory that `validate` wrote.

    Raises:
        UserError: if it is absent or incomplete.
    """
    directory = Path(directory)
    content = read_json(directory / "dataset.json")
    try:
        return PreparedDataset(
            directory, content["task"], tuple(content["labels"]), dict(content["rows"])
        )
    except (KeyError, TypeError):
        raise UserError(f"{directory / 'dataset.json'} was not written by validate") from None


def save_prepared(
    directory: str | Path,
    task: str,
    splits: Mapping[str, pd.DataFrame],
    rejected: pd.DataFrame,
) -> None:
    """Write a prepared dataset, whole or not at all; the same rows give the same bytes."""
    columns = [*FIELDS[task], "file", "row"]
    labels = {label for rows in splits.values() for label in rows.get("label", ())}
    with replace_directory(directory) as staging:
        for name in SPLITS:
            _write_parquet(splits[name][columns], staging / f"{name}.parquet")
        _write_parquet(rejected, staging / "rejected.parquet")
        rows = {name: len(splits[name]) for name in SPLITS}
        content = {"task": task, "labels": sorted(labels), "rows": rows}
        write_json(staging / "dataset.json", content)


def _write_parquet(rows: pd.DataFrame, path: Path) -> None:
    # Columns that are empty have no type of their own; metadata would name versions of libraries.
    types = [pa.int64() if name == "row" else pa.large_string() for name in rows.columns]
    schema = pa.schema(list(zip(rows.columns, types, strict=True)))
    table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd")
