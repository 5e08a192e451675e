"""Clean datasets of every shape: their rows, their files and the results of `validate`."""

from __future__ import annotations

import csv
import functools
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import Validated, validate
from gptj8.params.sections import Data
from tests.dataset.validation.corruption.texts import text_of

SIZES = {"train": 60, "validation": 24, "test": 24}
LABELS = ("sehr gut", "mauvais, hélas", "ни то ни сё")
INSTRUCTIONS = (
    "Fasse den Text zusammen.",
    "Translate into French, s'il te plaît:",
    "Which numbers are in it? Answer as JSON: {}",
    "Continue.",
)

Place = tuple[str, int]
"""A row: its split and its number, counted from 1."""


@dataclass
class Dataset:
    """Rows by split, and raw lines that replace some of them in the file."""

    shape: str
    rows: dict[str, list[dict[str, Any]]]
    raw: dict[Place, bytes] = field(default_factory=dict)

    def row(self, place: Place) -> dict[str, Any]:
        """Return a row."""
        return self.rows[place[0]][place[1] - 1]

    def copy(self, source: Place, target: Place) -> dict[str, Any]:
        """Replace the target row with a copy of the source row, and return the copy."""
        found = json.loads(json.dumps(self.row(source)))
        self.rows[target[0]][target[1] - 1] = found
        return found

    def text(self, place: Place) -> str:
        """Return the text of a row, the part that is damaged."""
        return SHAPES[self.shape].get(self.row(place))

    def put(self, place: Place, text: str) -> None:
        """Set the text of a row."""
        SHAPES[self.shape].put(self.row(place), text)

    def write(self, folder: Path, suffix: str) -> dict[str, str]:
        """Write one file per split; return the paths."""
        paths = {}
        for split, rows in self.rows.items():
            path = folder / f"{split}{suffix}"
            if suffix == ".parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
            else:
                lines = [
                    self.raw.get((split, number), as_line(row, suffix))
                    for number, row in enumerate(rows, 1)
                ]
                header = [csv_line(list(rows[0]))] if suffix == ".csv" else []
                path.write_bytes(b"".join([*header, *lines]))
            paths[split] = str(path)
        return paths


def csv_line(cells: Sequence[object]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerow(cells)
    return stream.getvalue().encode("utf-8", "surrogateescape")


def as_line(row: dict[str, Any], suffix: str) -> bytes:
    if suffix == ".csv":
        return csv_line(list(row.values()))
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate, which can only be written as an escape
        return (json.dumps(row) + "\n").encode()


@dataclass(frozen=True)
class ShapeCase:
    """A shape: its params, its clean rows and the part of a row that is damaged.

    Attributes:
        column: the column of findings in the text.
        answer: the column of findings in the answer.
    """

    params: dict[str, Any]
    make: Callable[[int, int], dict[str, Any]]
    get: Callable[[dict[str, Any]], str]
    put: Callable[[dict[str, Any], str], None]
    column: str
    answer: str
    formats: tuple[str, ...] = (".csv", ".jsonl", ".parquet")


def in_column(name: str) -> tuple[Callable, Callable]:
    return lambda row: row[name], lambda row, text: row.__setitem__(name, text)


def in_first_message(column: str, key: str) -> tuple[Callable, Callable]:
    return (
        lambda row: row[column][0][key],
        lambda row, text: row[column][0].__setitem__(key, text),
    )


def chat(index: int, seed: int, column: str, keys: tuple[str, str], roles: Sequence[str]) -> dict:
    user, assistant, system = roles
    texts = [(user, text_of(index, seed)), (assistant, text_of(index + 1, seed + 90))]
    if index % 3 == 0:
        texts += [(user, text_of(index + 2, seed + 91)), (assistant, "Sì, {certo}!")]
    if index % 4 == 0:
        texts.insert(1, (system, "Be brief."))
    return {column: [dict(zip(keys, text, strict=True)) for text in texts]}


SHAPES = {
    "text": ShapeCase(
        {"task": "text", "text_column": "body"},
        lambda index, seed: {"id": str(index), "body": text_of(index, seed)},
        *in_column("body"),
        "body",
        "",
    ),
    "labelled": ShapeCase(
        {"text_column": "tweet", "label_column": "class"},
        lambda index, seed: {"tweet": text_of(index, seed), "class": LABELS[index % 3]},
        *in_column("tweet"),
        "tweet",
        "class",
    ),
    "completion": ShapeCase(
        {
            "task": "completion",
            "prompt_column": "question",
            "completion_column": "reply",
            "prompt_template": "Q: {prompt}\nA:",
        },
        lambda i, seed: {"question": text_of(i, seed), "reply": text_of(i + 1, seed + 90)},
        *in_column("question"),
        "question",
        "reply",
    ),
    "instruction": ShapeCase(
        {
            "task": "completion",
            "completion_column": "output",
            "prompt_template": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
            "### Response:\n",
        },
        lambda i, seed: {
            "instruction": text_of(i, seed) if i % 5 == 0 else INSTRUCTIONS[i % 4],
            "input": "" if i % 5 == 0 else text_of(i, seed),
            "output": text_of(i + 1, seed + 90),
        },
        *in_column("instruction"),
        "instruction",
        "output",
    ),
    "chat": ShapeCase(
        {
            "task": "completion",
            "prompt_template": "{messages}\nassistant:",
        },
        lambda i, seed: chat(
            i, seed, "messages", ("role", "content"), ("user", "assistant", "system")
        ),
        *in_first_message("messages", "content"),
        "messages",
        "messages",
        (".jsonl", ".parquet"),
    ),
    "sharegpt": ShapeCase(
        {
            "task": "completion",
            "prompt_template": "{messages}\nassistant:",
            "messages_column": "conversations",
        },
        lambda i, seed: chat(
            i, seed, "conversations", ("from", "value"), ("human", "gpt", "system")
        ),
        *in_first_message("conversations", "value"),
        "conversations",
        "conversations",
        (".jsonl", ".parquet"),
    ),
}
# The column of findings about the complete text of a row.
WHOLE = {name: case.column for name, case in SHAPES.items()} | {"instruction": "instruction, input"}


def clean(shape: str) -> Dataset:
    make = SHAPES[shape].make
    return Dataset(
        shape,
        {
            split: [make(index, seed) for index in range(size)]
            for seed, (split, size) in enumerate(SIZES.items())
        },
    )


def data_of(shape: str, paths: dict[str, str], params: dict[str, Any]) -> Data:
    base = {"max_length": 2048, "max_invalid_fraction": 0.5, "on_leak": "drop"}
    return Data(**(base | SHAPES[shape].params | paths | params))


@dataclass
class Result:
    """The result of validation, its findings and the rows it kept."""

    validated: Validated
    findings: pd.DataFrame
    splits: dict[str, pd.DataFrame]

    @property
    def places(self) -> list[tuple[str, int, str, str]]:
        found = self.findings
        assert [Path(f).stem for f in found["file"]] == found["split"].tolist()
        return sorted(
            zip(found["split"], found["row"], found["check"], found["column"], strict=True)
        )


def check(dataset: Dataset, suffix: str, params: dict[str, Any], encoder: TextEncoder) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prepared").mkdir()
        data = data_of(dataset.shape, dataset.write(folder, suffix), params)
        validated = validate(data, encoder, folder / "prepared")
        splits = {}
        if not validated.problems:
            splits = {
                s: pq.read_table(folder / f"prepared/{s}.parquet").to_pandas() for s in SPLITS
            }
        return Result(validated, validated.findings.frame(), splits)


@functools.cache
def clean_result(shape: str, suffix: str, encoder: TextEncoder) -> Result:
    return check(clean(shape), suffix, {}, encoder)
