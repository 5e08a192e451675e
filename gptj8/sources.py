"""A user's files as splits: which file is which split, and what to hold out where one has no file.

How a file becomes rows is in `gptj8.formats`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from gptj8.dataset import FIELDS, SPLITS
from gptj8.errors import UserError
from gptj8.formats import SUFFIXES, explain_missing_file, read_rows
from gptj8.params import Data

_FILE_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def columns_of(data: Data) -> dict[str, str]:
    """Return for each field of the task the name of the user's column that holds it."""
    return {field: getattr(data, f"{field}_column") for field in FIELDS[data.task]}


def read_splits(data: Data) -> dict[str, pd.DataFrame]:
    """Read the files that `data` names or that lie in its directory.

    Returns:
        A frame for each split that has a file of its own; `train` is always among them.

    Raises:
        UserError: a line for each file that is missing, lacks a column, is empty or is damaged.
    """
    files = _files_of_splits(data)
    columns = columns_of(data)
    parts: dict[str, list[pd.DataFrame]] = {split: [] for split in files}
    problems: list[str] = []
    for split, paths in files.items():
        for path in paths:
            try:
                parts[split].append(read_rows(path, columns))
            except UserError as error:
                problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return {split: pd.concat(frames, ignore_index=True) for split, frames in parts.items()}


def content_key(text: str) -> str:
    """Return the SHA-256 of a text in which only its characters count.

    Canonically equivalent Unicode (NFC) is the same text, and any run of whitespace is one space.
    Case and punctuation count: two texts that differ in them are not duplicates but relatives.
    """
    normalized = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normalized.encode()).hexdigest()


def hold_out(
    rows: pd.DataFrame,
    shares: Mapping[str, float],
    keys: pd.Series,
    labels: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Take splits out of `rows` by the rank of each text's content hash.

    What is chosen depends on the texts alone, neither on their order nor on a seed, and all rows of
    one text go together, so that no duplicate is ever in two splits. Ranks and not a threshold on
    the hash: of 12 rows a threshold may well take none, a rank takes its exact share. With labels,
    each label is divided on its own and gives at least one text to every split; a label with fewer
    texts than there are splits stays in `train` whole. A text with several labels counts for the
    first of them.

    Args:
        rows: what to divide.
        shares: splits to take out, and the share of the distinct texts for each, the test split
            first: then a change of the validation's share leaves the test split as it is.
        keys: `content_key` of each row's text.
        labels: the label of each row.

    Returns:
        The given splits and `train`, which holds the rest; each in the order of `rows`.
    """
    texts = pd.DataFrame({"key": keys, "label": "" if labels is None else labels})
    texts = texts.sort_values(["key", "label"]).drop_duplicates("key")
    split_of: dict[str, str] = {}
    for _, group in texts.groupby("label", sort=True):
        ranked = group["key"].tolist()
        if len(ranked) <= len(shares):
            continue
        start = 0
        for split, share in shares.items():
            count = max(1, round(share * len(ranked)))
            split_of.update(dict.fromkeys(ranked[start : start + count], split))
            start += count
        if start >= len(ranked):  # rounding took everything: the last one goes back
            split_of.pop(ranked[-1])
    splits = keys.map(lambda key: split_of.get(key, "train"))
    return {name: rows[splits == name] for name in ("train", *shares)}


def _files_of_splits(data: Data) -> dict[str, list[Path]]:
    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        value = getattr(data, split)
        if value is None:
            continue
        path = Path(value)
        if not path.exists():
            problems.append(f"data.{split}: {explain_missing_file(path)}")
        elif path.is_file():
            files[split] = [path]
        elif split != "train":
            problems.append(f"data.{split}: {path} is a directory; name a file")
        else:
            files.update(_files_in_directory(path, problems))
    if problems:
        raise UserError("\n".join(problems))
    return {split: files[split] for split in SPLITS if split in files}


def _files_in_directory(directory: Path, problems: list[str]) -> dict[str, list[Path]]:
    """Find `train.csv`, `dev.jsonl`, or the Hub's `train-00000-of-00002.parquet`."""
    names = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    files: dict[str, list[Path]] = {}
    for split, stems in _FILE_NAMES.items():
        pattern = re.compile(rf"({'|'.join(stems)})(-\d+-of-\d+)?", re.IGNORECASE)
        found = [path for path in names if pattern.fullmatch(path.stem)]
        whole = [path for path in found if "-of-" not in path.stem]
        if whole and len(found) > 1:
            listed = ", ".join(path.name for path in found)
            problems.append(f"{directory} has more than one {split} file: {listed}")
        if found:
            files[split] = found
    if "train" not in files:
        listed = ", ".join(path.name for path in names[:10]) or "none"
        problems.append(
            f"data.train: {directory} has no file train with one of the suffixes "
            f"{', '.join(SUFFIXES)}; files that could be read: {listed}"
        )
    return files
