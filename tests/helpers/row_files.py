"""Write the same rows in every format, without using the code under test."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd

ROWS = [
    ("It's a test, isn't it?", "spam"),
    ('two\nlines and a "quote"', "not spam"),
    ("naïve — 漢字 🙂", "spam"),
]


def write_csv(
    path: Path, header: list[str], rows: list, delimiter: str = ",", bom: bool = False
) -> Path:
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return path


def write_rows(path: Path) -> Path:
    """Write ROWS in the format of the path's suffix."""
    records = [{"text": text, "label": label} for text, label in ROWS]
    if path.suffix in (".csv", ".tsv"):
        return write_csv(path, ["text", "label"], ROWS, "," if path.suffix == ".csv" else "\t")
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        pd.DataFrame(records).to_parquet(path)
    return path
