"""Read predictions of external systems for the test split from CSV files.

Any system can be compared on the same rows: a classifier from another library, an API, or humans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gptj8.dataset.readers.formats import explain_missing_file
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.parsers import parse_file
from gptj8.evaluation.systems import CONFIDENCE, OWN_SYSTEMS, WROTE
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import listed, quote, suggest

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ROW = re.compile(r"[0-9]{1,18}")
_EXAMPLES = 3
_READ = {name: name for name in ("file", "row", "prediction")}

_Key = tuple[str, int]


def read_predictions(
    path: str | Path, test: pd.DataFrame, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read the predictions of one system, or of each CSV file in a directory.

    The name of a system is its file name without the suffix. A file needs the columns `file` and
    `row`, which identify a row of the test split, and `prediction`. The order is arbitrary, other
    columns are ignored, and `file` may be omitted if all test rows are from one file. Predictions
    are read as text and stripped of surrounding white space. A prediction that is not a label
    counts as wrong. A file in which no prediction is a label raises an error, because it probably
    contains label indices or other label names.

    Args:
        path: a CSV file, or a directory of CSV files.
        test: the test split, with `file` and `row`.
        labels: all labels.

    Returns:
        system -> (test rows,) predictions, dtype object.

    Raises:
        UserError: listing the problems of all files, one per line: rows without a prediction or
            with several, records that match no row, missing columns, invalid CSV files.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(explain_missing_file(path))
    if not labels:
        raise UserError(f"{path}: predictions can be compared only for a task with labels")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() == ".csv" and f.is_file())
        if not files:
            raise UserError(f"{path} has no CSV files")
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
        return [f"{path}: predictions must be in a .csv file"]
    if not _NAME.fullmatch(path.stem):
        return [f"{path}: a system name can have only letters, digits, _ and -; rename the file"]
    if path.stem in OWN_SYSTEMS:
        return [f"{path}: {path.stem} is the name of a built-in system; rename the file"]
    if path.stem.endswith((CONFIDENCE, WROTE)):
        ending = CONFIDENCE if path.stem.endswith(CONFIDENCE) else WROTE
        return [f"{path}: names of columns end in {ending}, and no system's; rename the file"]
    return []


def _read_system(
    path: Path, places: Mapping[_Key, int], labels: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the predictions in the order of the test split, and the problems of the file."""
    predictions = np.full(len(places), None, dtype=object)
    files = {file for file, _ in places}
    only_file = next(iter(files)) if len(files) == 1 else ""
    required = ("row", "prediction") if only_file else ("file", "row", "prediction")
    found: dict[str, list[str]] = {}
    repeated: dict[_Key, None] = {}

    def add(problem: str, example: str) -> None:
        found.setdefault(problem, []).append(example)

    try:
        for record in parse_file(path, ReadOptions(_READ, delimiter=",", quoting="minimal")):
            where = f"record {record.number}"
            if record.problem:
                add("unreadable records", f"{where} {record.problem}")
                continue
            cells = record.cells
            missing = [name for name in required if name not in cells]
            if missing:
                other = next((c for c in ";\t|" if any(c in name for name in cells)), None)
                hint = f"; the columns are separated by {other!r}, use commas" if other else None
                return predictions, [
                    f"{path} has no column {name}{hint or suggest(name, cells)}" for name in missing
                ]
            text = cells["row"].strip()
            file, prediction = cells.get("file", only_file), cells["prediction"].strip()
            if not _is_text(file + text + prediction):
                add("records that are not UTF-8", where)
                continue
            if not _ROW.fullmatch(text):
                add("records whose row is not an integer", f"{where} has {quote(text)}")
                continue
            if not prediction:
                add("records with an empty prediction", where)
                continue
            key = file, int(text)
            if key not in places:
                add("records that match no test row", f"{where} has {_format_key(key)}")
            elif predictions[places[key]] is not None:
                repeated[key] = None
            else:
                predictions[places[key]] = prediction
    except UserError as error:
        return predictions, [str(error)]
    absent = [key for key, place in places.items() if predictions[place] is None]
    found["test rows with more than one prediction"] = [_format_key(key) for key in repeated]
    found["test rows without a prediction"] = [_format_key(key) for key in absent]
    problems = [
        f"{path}: {problem}: {_count_with_examples(examples)}"
        for problem, examples in found.items()
        if examples
    ]
    if not problems and not set(predictions) & set(labels):
        unknown = listed(sorted(set(predictions)), _EXAMPLES)
        known = listed(labels, _EXAMPLES)
        problems = [f"{path}: no prediction is a known label: {unknown}; the labels are {known}"]
    return predictions, problems


def _format_key(key: _Key) -> str:
    return f"{quote(key[0])} row {key[1]}"


def _count_with_examples(examples: Sequence[str]) -> str:
    """Return the number of examples, followed by the first few."""
    more = ", ..." if len(examples) > _EXAMPLES else ""
    return f"{len(examples):,} ({', '.join(examples[:_EXAMPLES])}{more})"


def _is_text(cell: str) -> bool:
    """Return whether a cell is valid UTF-8.

    `gptj8.dataset.readers.parsers` decodes invalid bytes to surrogates.
    """
    return not any("\ud800" <= character <= "\udfff" for character in cell)
