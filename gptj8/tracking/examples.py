"""Prompts of a few test rows with the answers before and after training, to read side by side."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from gptj8.params.templates import split_at_fields
from gptj8.runtime.files import read_json

EXAMPLES = 20
"""Rows of the table: the first ones of the test split that were answered."""
_CHARACTERS = 4000  # of a prompt
_SYSTEMS = ("base", "tuned")


def example_answers(dataset: Path, predictions: Path) -> tuple[list[str], list[list[str]]] | None:
    """Return the columns `prompt`, `expected`, `base` and `tuned`, and the rows.

    An answer is the predicted label, or else the generated text. A conversation is shown as it is
    in predictions.csv, because only the model's chat template knows its prompt.

    Args:
        dataset: output of `validate`.
        predictions: predictions.csv of `evaluate`.

    Returns:
        None if no test rows were answered, or their prepared dataset is not in place.
    """
    if not (dataset / "dataset.json").is_file() or not (dataset / "test.parquet").is_file():
        return None
    with open(predictions, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        answered = list(itertools.islice(reader, EXAMPLES))
        names = reader.fieldnames or []
    columns = {s: next((n for n in (s, f"{s}_wrote") if n in names), None) for s in _SYSTEMS}
    if not answered or None in columns.values():
        return None
    question, expected = ("prompt", "completion") if "completion" in names else ("text", "label")
    prompts = _prompts(dataset, question)
    rows = [
        [
            prompts.get((row["file"], row["row"]), row[question]),
            row[expected],
            *(row[column] for column in columns.values() if column is not None),
        ]
        for row in answered
    ]
    return ["prompt", "expected", *_SYSTEMS], rows


def _prompts(dataset: Path, question: str) -> dict[tuple[str, str], str]:
    """Return (file, row) -> prompt for the first test rows; empty for conversations."""
    import pyarrow.parquet as pq

    description = read_json(dataset / "dataset.json")
    if description.get("chat"):
        return {}
    before, *after = split_at_fields(description["prompt_template"])[0]
    with pq.ParquetFile(dataset / "test.parquet") as file:
        batch = next(file.iter_batches(EXAMPLES, columns=["file", "row", question]), None)
    rows = [] if batch is None else batch.to_pylist()
    return {
        (row["file"], str(row["row"])): (before + row[question] + "".join(after))[:_CHARACTERS]
        for row in rows
    }
