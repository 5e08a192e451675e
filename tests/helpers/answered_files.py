"""Run `gptj8 generate --input` in this process, and read what it wrote with other libraries."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq

from gptj8.commands.main import _parser

WORDS = "the quick brown fox jumps over lazy dog seven wizards box with jugs".split()


def texts(count):
    """Return texts of different lengths."""
    return [" ".join(WORDS[(n * 5 + k) % 13] for k in range(1 + n * 7 % 11)) for n in range(count)]


def generate(model, export, *arguments):
    """Run the command; errors are raised as UserError."""
    options = ["--model", model, "--adapter", export, "--dtype", "float32", *arguments]
    parsed = _parser().parse_args(["generate", *map(str, options)])
    parsed.command(parsed)


def read_answers(path: Path):
    """Return the rows of an output file as dictionaries."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pq.read_table(path).to_pylist()
