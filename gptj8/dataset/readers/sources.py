"""A user's files as splits: which file is which split; and when two texts are the same.

How a file becomes rows is in `gptj8.dataset.readers.formats`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.readers.formats import explain_missing_file
from gptj8.dataset.readers.parsers import COMPRESSIONS, SUFFIXES, suffix_of
from gptj8.dataset.text import canonical_words
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")
_WORDS = re.compile(r"[\W_]+")
_PATTERN_CHARACTERS = "*?["
_HUB = (
    "for a dataset of the Hub set `dataset` in data/datasets/hub/params.yaml and data.train to "
    "data/datasets/hub/splits"
)


class Sources(NamedTuple):
    """What there is to read.

    Attributes:
        files: of each split that has some; `train` is always among them.
        ignored: files beside them that are not read.
    """

    files: dict[str, list[Path]]
    ignored: list[Path]


def find_sources(data: Data) -> Sources:
    """Find the files of each split.

    `data.train` may be a file; a directory whose files or folders are named after the splits
    (`train.csv`, `dev.jsonl.gz`, the Hub's `data/train-00000-of-00002.parquet`, `test/part1.csv`);
    or a directory of files without such names, all of them training rows. `data.validation` and
    `data.test` may be files or directories. A pattern (`data.train_files` and so on) chooses files
    of a directory, at any depth with `**/`.

    Raises:
        UserError: a line for each path that is missing or ambiguous.
    """
    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    there: set[Path] = set()
    for split in SPLITS:
        value, pattern = getattr(data, split), getattr(data, f"{split}_files")
        if value is None:
            if pattern is not None:
                problems.append(f"data.{split}_files = {pattern} needs a directory in data.{split}")
            continue
        path = Path(value)
        if not path.exists():
            problems.append(explain_missing(split, value))
        elif path.is_file():
            if pattern is not None:
                problems.append(
                    f"data.{split}_files = {pattern} needs a directory, and {path} is a file"
                )
            files[split] = [path]
        else:
            inside = _files_below(path)
            there.update(inside)
            readable = [file for file in inside if suffix_of(file) in SUFFIXES]
            if pattern is not None:
                files[split] = _matching(path, pattern, readable, split, problems)
            elif split == "train":
                files.update(_splits_in_directory(path, readable, problems))
            else:
                files[split] = readable
            if not files.get(split) and not problems:
                known = ", ".join(SUFFIXES)
                problems.append(
                    f"data.{split}: {path} has no file with one of the suffixes {known}"
                )
    problems += _problems_of_files(files)
    if problems:
        raise UserError("\n".join(problems))
    read = {file for paths in files.values() for file in paths}
    ordered = {split: files[split] for split in SPLITS if split in files}
    return Sources(ordered, sorted(there - read))


def _problems_of_files(files: Mapping[str, Sequence[Path]]) -> list[str]:
    problems: list[str] = []
    owners: dict[Path, str] = {}
    shards: dict[tuple[Path, str, int], set[int]] = {}
    for split, paths in files.items():
        for path in paths:
            other = owners.setdefault(path.resolve(), split)
            if other != split:
                problems.append(f"{path} is a file of data.{other} and of data.{split}")
            try:
                str(path).encode()
            except UnicodeEncodeError:
                problems.append(f"{str(path)!a}: its name is not UTF-8; rename it")
            if shard := _SHARD.fullmatch(_stem(path)):
                name, number, total = shard[1], int(shard[2]), int(shard[3])
                shards.setdefault((path.parent, name, total), set()).add(number)
    for (folder, name, total), numbers in shards.items():
        missing = sorted(set(range(total)) - numbers)
        if missing and max(numbers) < total:
            listed = ", ".join(f"{number:05}" for number in missing[:10])
            problems.append(f"{folder}/{name}: of {total} files these are missing: {listed}")
    return problems


def content_key(text: str) -> bytes:
    """Return the SHA-256 of a text in which only its characters count.

    Canonically equivalent Unicode (NFC) is the same text, and any run of whitespace is one space.
    Case and punctuation count: two texts that differ in them are not duplicates but relatives.
    """
    return hashlib.sha256(" ".join(canonical_words(text, "NFC")).encode()).digest()


def explain_missing(split: str, value: str) -> str:
    """Return why `data.<split>` is nothing that can be read, and the way out."""
    path = Path(value)
    if value.startswith("hf:") or "://" in value:
        return f"data.{split}: {value} is not a path; {_HUB}"
    if any(character in value for character in _PATTERN_CHARACTERS):
        folder = path.parent
        while any(character in str(folder) for character in _PATTERN_CHARACTERS):
            folder = folder.parent
        return (
            f"data.{split}: {path} is a pattern, and DVC follows paths; set data.{split}: {folder} "
            f"and data.{split}_files: {path.relative_to(folder)}"
        )
    missing = f"data.{split}: {explain_missing_file(path)}"
    looks_like_an_id = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and suffix_of(path) not in SUFFIXES
    return f"{missing}; {_HUB}" if looks_like_an_id else missing


def _files_below(directory: Path) -> list[Path]:
    """Return all files, those of linked folders too, but hidden ones."""
    found: list[Path] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(place)
        found += [Path(folder) / name for name in names if not name.startswith((".", "_"))]
    hidden = (path for path in found if any(p.startswith(".") for p in _parts(directory, path)))
    return sorted(set(found) - set(hidden))


def _parts(directory: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(directory).parts


def _matching(
    directory: Path, pattern: str, readable: Sequence[Path], split: str, problems: list[str]
) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        problems.append(f"data.{split}_files = {pattern} leaves {directory}")
        return []
    chosen = set(directory.glob(pattern))
    found = [path for path in readable if path in chosen]
    if not found:
        near = ", ".join(path.name for path in readable[:10]) or "none"
        problems.append(
            f"data.{split}_files = {pattern} matches no readable file in {directory}; "
            f"files that could be read: {near}"
        )
    return found


def _splits_in_directory(
    directory: Path, readable: Sequence[Path], problems: list[str]
) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    similar: list[Path] = []
    for path in readable:
        parts = [part.casefold() for part in (*_parts(directory, path)[:-1], _stem(path))]
        if shard := _SHARD.fullmatch(parts[-1]):
            parts[-1] = shard[1]
        splits = {_SPLIT_OF[part] for part in parts if part in _SPLIT_OF}
        if len(splits) == 1:
            named.setdefault(splits.pop(), []).append(path)
        elif splits or any(word in _SPLIT_OF for part in parts for word in _WORDS.split(part)):
            similar.append(path)
    if similar:
        listed = ", ".join(path.relative_to(directory).as_posix() for path in similar[:10])
        problems.append(
            f"{directory}: {listed} may be a split, and is not named train, validation or test "
            "alone; name each split's files with data.train_files, data.validation_files and "
            "data.test_files, and the directory in data.validation and data.test as well"
        )
    for split, found in named.items():
        # One file, or shards, or a folder's files, but not train.csv beside train.jsonl.
        top = [path for path in found if not _SHARD.fullmatch(_stem(path))]
        stems = [path.with_name(_stem(path)) for path in top]
        if len(set(stems)) < len(stems) or (len(top) < len(found) and top):
            listed = ", ".join(path.relative_to(directory).as_posix() for path in found)
            problems.append(f"{directory} has more than one {split} file: {listed}")
    if not named:
        return {"train": list(readable)}
    if "train" not in named:
        listed = ", ".join(path.relative_to(directory).as_posix() for path in readable[:10])
        problems.append(
            f"data.train: {directory} has files for {' and '.join(named)} and no file or folder "
            f"named train; files that could be read: {listed}"
        )
    return named


def _stem(path: Path) -> str:
    """Return a file's name without its suffixes: `train` of `train.csv.gz`."""
    stem = path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSIONS else path.name
    return Path(stem).stem
