"""What systems outside this project predict for the test split, read from CSV files.

So any model can be compared on the same rows: a classifier of another library, an API, or people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gptj8.dataset.readers.formats import explain_missing_file
from gptj8.dataset.readers.parsers import parse_file
from gptj8.evaluation.systems import OWN_SYSTEMS
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import listed, quote, suggest

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ROW = re.compile(r"[0-9]{1,18}")
_EXAMPLES = 3

_Key = tuple[str, int]


def read_predictions(
    path: str | Path, test: pd.DataFrame, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read the predictions of one system, or of each CSV file in a directory.

    A system is named as its file is, without the suffix. The file has the columns `file` and `row`,
    which name a row of the test split, and `prediction`; their order is free, other columns are
    allowed, and `file` may be missing where the test split is of one file. Predictions are read as
    text, without white space around them. One that is no label is a wrong one, as a model's may be;
    a file without any label is refused, because it rather holds numbers of labels or other names.

    Args:
        path: a CSV file, or a directory with such.
        test: the test split, with `file` and `row`.
        labels: all labels.

    Returns:
        system -> (test rows,) predictions, dtype object.

    Raises:
        UserError: with every problem of every file, a line each: a row without a prediction, or
            with two, a record for no row, a column that is not there, a file that is not CSV.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(explain_missing_file(path))
    if not labels:
        raise UserError(f"{path}: predictions are compared only where there are labels")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() == ".csv" and f.is_file())
        if not files:
            raise UserError(f"{path} has no CSV file of predictions")
    places = {
        (str(file), int(row)): place
        for place, (file, row) in enumerate(zip(test["file"], test["row"], strict=True))
    }
    predictions, problems = {}, []
    for file in files:
        wrong = _check_name(file)
        if not wrong:
            predictions[file.stem], wrong = _read_system(file, places, labels)
        problems += wrong
    if problems:
        raise UserError("\n".join(problems))
    return predictions


def _check_name(path: Path) -> list[str]:
    if path.suffix.lower() != ".csv":
        return [f"{path}: predictions are read from a file that ends in .csv"]
    if not _NAME.fullmatch(path.stem):
        return [f"{path}: a system's name has only letters, digits, _ and -; rename the file"]
    if path.stem in OWN_SYSTEMS:
        return [f"{path}: {path.stem} is the name of a system measured here; rename the file"]
    return []


def _read_system(
    path: Path, places: Mapping[_Key, int], labels: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the predictions in the order of the test split, and what is wrong with the file."""
    predictions = np.full(len(places), None, dtype=object)
    files = {file for file, _ in places}
    only_file = next(iter(files)) if len(files) == 1 else ""
    required = ("row", "prediction") if only_file else ("file", "row", "prediction")
    found: dict[str, list[str]] = {}
    repeated: dict[_Key, None] = {}

    def add(problem: str, example: str) -> None:
        found.setdefault(problem, []).append(example)

    try:
        for record in parse_file(path, {}, "line", lambda size: None):
            where = f"record {record.number}"
            if record.problem:
                add("records that cannot be read", f"{where} {record.problem}")
                continue
            cells = record.cells
            missing = [name for name in required if name not in cells]
            if missing:
                other = next((c for c in ";\t|" if any(c in name for name in cells)), None)
                hint = f"; its columns are separated by {other!r}, write commas" if other else None
                return predictions, [
                    f"{path} has no column {name}{hint or suggest(name, cells)}" for name in missing
                ]
            text = cells["row"].strip()
            file, prediction = cells.get("file", only_file), cells["prediction"].strip()
            if not _is_text(file + text + prediction):
                add("records that are not UTF-8", where)
                continue
            if not _ROW.fullmatch(text):
                add("records whose row is no whole number", f"{where} has {quote(text)}")
                continue
            if not prediction:
                add("records whose prediction is empty", where)
                continue
            key = file, int(text)
            if key not in places:
                add("records of no test row", f"{where} has {_shown(key)}")
            elif predictions[places[key]] is not None:
                repeated[key] = None
            else:
                predictions[places[key]] = prediction
    except UserError as error:
        return predictions, [str(error)]
    absent = [key for key, place in places.items() if predictions[place] is None]
    found["test rows with more than one prediction"] = [_shown(key) for key in repeated]
    found["test rows without a prediction"] = [_shown(key) for key in absent]
    problems = [
        f"{path}: {problem}: {_first(examples)}" for problem, examples in found.items() if examples
    ]
    if not problems and not set(predictions) & set(labels):
        unknown = listed(sorted(set(predictions)), _EXAMPLES)
        known = listed(labels, _EXAMPLES)
        problems = [f"{path}: no prediction is a label: {unknown}; the labels are {known}"]
    return predictions, problems


def _shown(key: _Key) -> str:
    return f"{quote(key[0])} row {key[1]}"


def _first(examples: Sequence[str]) -> str:
    """Return how many there are, with the first few."""
    more = ", ..." if len(examples) > _EXAMPLES else ""
    return f"{len(examples):,} ({', '.join(examples[:_EXAMPLES])}{more})"


def _is_text(cell: str) -> bool:
    """Return whether no byte of a cell had to be kept as a surrogate
    (`gptj8.dataset.readers.parsers`)."""
    return not any("\ud800" <= character <= "\udfff" for character in cell)
