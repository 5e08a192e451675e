"""A user's files as splits: which file is which split, and what to hold out where one has no file.

How a file becomes rows is in `gptj8.formats`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from gptj8.dataset import SPLITS
from gptj8.errors import UserError
from gptj8.formats import explain_missing_file
from gptj8.params import Data
from gptj8.parsers import SUFFIXES, suffix_of
from gptj8.words import canonical_words

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_PATTERN_CHARACTERS = "*?["


def find_files(data: Data) -> dict[str, list[Path]]:
    """Find the files of each split that has some; `train` is always among them.

    `data.train` may be a file; a directory whose files or folders are named after the splits
    (`train.csv`, `dev.jsonl.gz`, the Hub's `train-00000-of-00002.parquet`, `test/part1.csv`); or a
    directory of files without such names, all of them training rows. `data.validation` and
    `data.test` may be files or directories. A pattern (`data.train_files` and so on) chooses files
    of a directory, at any depth with `**/`.

    Raises:
        UserError: a line for each path that is missing or ambiguous.
    """
    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        value, pattern = getattr(data, split), getattr(data, f"{split}_files")
        if value is None:
            if pattern is not None:
                problems.append(f"data.{split}_files = {pattern} needs a directory in data.{split}")
            continue
        path = Path(value)
        if not path.exists():
            problems.append(explain_missing(split, path))
        elif path.is_file():
            if pattern is not None:
                problems.append(
                    f"data.{split}_files = {pattern} needs a directory, and {path} is a file"
                )
            files[split] = [path]
        elif pattern is not None:
            files[split] = _matching(path, pattern, split, problems)
        elif split == "train":
            files.update(_splits_in_directory(path, problems))
        else:
            files[split] = _all_readable(path, split, problems)
    owners: dict[Path, str] = {}
    for split, paths in files.items():
        for path in paths:
            other = owners.setdefault(path.resolve(), split)
            if other != split:
                problems.append(f"{path} is a file of data.{other} and of data.{split}")
    if problems:
        raise UserError("\n".join(problems))
    return {split: files[split] for split in SPLITS if split in files}


def content_key(text: str) -> bytes:
    """Return the SHA-256 of a text in which only its characters count.

    Canonically equivalent Unicode (NFC) is the same text, and any run of whitespace is one space.
    Case and punctuation count: two texts that differ in them are not duplicates but relatives.
    """
    return hashlib.sha256(" ".join(canonical_words(text, "NFC")).encode()).digest()


def explain_missing(split: str, path: Path) -> str:
    """Return why `data.<split>` is nothing that can be read, and the way out."""
    text = str(path)
    if text.startswith("hf:") or "://" in text:
        return (
            f"data.{split}: {text} is not a path; for a dataset of the Hub set `dataset` in "
            "data/datasets/hub/params.yaml and data.train to data/datasets/hub/splits"
        )
    if any(character in text for character in _PATTERN_CHARACTERS):
        folder = path.parent
        while any(character in str(folder) for character in _PATTERN_CHARACTERS):
            folder = folder.parent
        return (
            f"data.{split}: {path} is a pattern, and DVC follows paths; set data.{split}: {folder} "
            f"and data.{split}_files: {path.relative_to(folder)}"
        )
    return f"data.{split}: {explain_missing_file(path)}"


def _readable(paths: list[Path]) -> list[Path]:
    hidden = (".", "_")
    return sorted(
        path
        for path in paths
        if path.is_file() and suffix_of(path) in SUFFIXES and not path.name.startswith(hidden)
    )


def _matching(directory: Path, pattern: str, split: str, problems: list[str]) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        problems.append(f"data.{split}_files = {pattern} leaves {directory}")
        return []
    found = _readable(list(directory.glob(pattern)))
    if not found:
        near = ", ".join(p.name for p in _readable(list(directory.rglob("*")))[:10]) or "none"
        problems.append(
            f"data.{split}_files = {pattern} matches no readable file in {directory}; "
            f"files that could be read: {near}"
        )
    return found


def _all_readable(directory: Path, split: str, problems: list[str]) -> list[Path]:
    found = _readable(list(directory.rglob("*")))
    if not found:
        problems.append(
            f"data.{split}: {directory} has no file with one of the suffixes {', '.join(SUFFIXES)}"
        )
    return found


def _splits_in_directory(directory: Path, problems: list[str]) -> dict[str, list[Path]]:
    readable = _all_readable(directory, "train", problems)
    named: dict[str, list[Path]] = {}
    for split, stems in _NAMES.items():
        pattern = re.compile(rf"({'|'.join(stems)})(-\d+-of-\d+)?", re.IGNORECASE)
        found = [path for path in readable if pattern.fullmatch(_first_part(directory, path))]
        in_top = [path for path in found if path.parent == directory]
        whole = [path for path in in_top if "-of-" not in path.name]
        if whole and len(found) > 1:
            listed = ", ".join(path.relative_to(directory).as_posix() for path in found)
            problems.append(f"{directory} has more than one {split} file: {listed}")
        if found:
            named[split] = found
    if not named:
        return {"train": readable}
    if "train" not in named:
        listed = ", ".join(path.relative_to(directory).as_posix() for path in readable[:10])
        problems.append(
            f"data.train: {directory} has files for {' and '.join(named)} and no file or folder "
            f"named train; files that could be read: {listed}"
        )
        return {}
    return named


def _first_part(directory: Path, path: Path) -> str:
    """Return the name that tells the split: of the folder below `directory`, or of the file."""
    first = path.relative_to(directory).parts[0]
    return first if first != path.name else first.partition(".")[0]
