"""Assign the user's files to splits, and define when two texts are equal.

`gptj8.dataset.readers.formats` reads the rows of a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.readers.folders import SPLIT_OF, is_unlabelled, stem_of, texts_by_label
from gptj8.dataset.readers.formats import explain_missing_file
from gptj8.dataset.readers.parsers import SUFFIXES
from gptj8.dataset.readers.text_files import TEXT_SUFFIXES, suffix_of
from gptj8.dataset.text import canonical_words
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")
_WORDS = re.compile(r"[\W_]+")
_PATTERN_CHARACTERS = "*?["
_HUB = (
    "for a Hub dataset, set `dataset` in data/datasets/hub/params.yaml and set data.train to "
    "data/datasets/hub/splits"
)


class Sources(NamedTuple):
    """The files to read.

    Attributes:
        files: the files of each split that has any; always includes `train`.
        ignored: files in the same directories that are not read.
        folder_labels: whether the files are texts whose folders are named as their labels.
    """

    files: dict[str, list[Path]]
    ignored: list[Path]
    folder_labels: bool = False

    @property
    def all_files(self) -> list[Path]:
        """The files of all splits."""
        return [file for paths in self.files.values() for file in paths]


def find_sources(data: Data) -> Sources:
    """Find the files of each split.

    `data.train` is one of: a file; a directory whose files or folders are named after the splits
    (`train.csv`, `dev.jsonl.gz`, the Hub's `data/train-00000-of-00002.parquet`, `test/part1.csv`);
    a directory of files without such names, all of which are training rows. `data.validation` and
    `data.test` may be files or directories. A pattern (`data.train_files` and so on) selects files
    in a directory, at any depth with `**/`. A directory may also have a folder of text files for
    each label of a classification (`train/pos/1.txt`).

    Raises:
        UserError: with one line per missing or ambiguous path.
    """
    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    existing: set[Path] = set()
    folder_labels = False
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
                    f"data.{split}_files = {pattern} needs a directory, but {path} is a file"
                )
            files[split] = [path]
        else:
            inside = _files_below(path)
            existing.update(inside)
            readable = [file for file in inside if suffix_of(file) in SUFFIXES]
            readable = _without_metadata(readable)
            if data.task == "classification" and (texts := texts_by_label(path, inside)):
                folder_labels = True
                readable = [file for file in texts if not is_unlabelled(file)]
            if pattern is not None:
                files[split] = _matching(path, pattern, readable, split, problems)
            elif split == "train":
                files.update(_splits_in_directory(path, readable, problems))
            else:
                files[split] = readable
            if not files.get(split) and not problems:
                known = ", ".join(SUFFIXES)
                problem = f"data.{split}: {path} has no file with a supported suffix: {known}"
                if plain := [file for file in inside if not suffix_of(file)]:
                    problem += (
                        f"; to read a text file without a suffix, set data.{split}: {plain[0]}"
                    )
                problems.append(problem)
    problems += _problems_of_files(files)
    if problems:
        raise UserError("\n".join(problems))
    read = {file for paths in files.values() for file in paths}
    ordered = {split: files[split] for split in SPLITS if split in files}
    if folder_labels:
        problems = [
            f"{file} is not in a folder that is named as its label"
            for file in sorted(read)
            if suffix_of(file) not in TEXT_SUFFIXES
        ]
        if problems:
            raise UserError("\n".join(problems[:3]))
    return Sources(ordered, sorted(existing - read), folder_labels)


def _problems_of_files(files: Mapping[str, Sequence[Path]]) -> list[str]:
    problems: list[str] = []
    owners: dict[Path, str] = {}
    real_folders: dict[Path, Path] = {}
    shards: dict[tuple[Path, str, int], set[int]] = {}
    for split, paths in files.items():
        for path in paths:
            parent = real_folders.get(path.parent)
            if parent is None:
                parent = real_folders[path.parent] = path.parent.resolve()
            is_link = os.path.islink(path)
            other = owners.setdefault(path.resolve() if is_link else parent / path.name, split)
            if other != split:
                problems.append(f"{path} is in both data.{other} and data.{split}")
            try:
                str(path).encode()
            except UnicodeEncodeError:
                problems.append(f"{str(path)!a}: the file name is not UTF-8; rename it")
            if "-of-" in path.name and (shard := _SHARD.fullmatch(stem_of(path))):
                name, number, total = shard[1], int(shard[2]), int(shard[3])
                shards.setdefault((path.parent, name, total), set()).add(number)
    for (folder, name, total), numbers in shards.items():
        missing = sorted(set(range(total)) - numbers)
        if missing and max(numbers) < total:
            listed = ", ".join(f"{number:05}" for number in missing[:10])
            problems.append(
                f"{folder}/{name}: {len(missing)} of {total} shards are missing: {listed}"
            )
    return problems


def content_key(text: str) -> bytes:
    """Return the SHA-256 of a text after normalization; texts with equal keys are duplicates.

    The text is converted to Unicode NFC, and each run of white space becomes one space. Case and
    punctuation are kept: texts that differ in these are not duplicates, but may be near-duplicates.
    """
    return hashlib.sha256(" ".join(canonical_words(text, "NFC")).encode()).digest()


def explain_missing(split: str, value: str) -> str:
    """Return why `data.<split>` cannot be read, and how to fix it."""
    path = Path(value)
    if value.startswith("hf:") or "://" in value:
        return f"data.{split}: {value} is not a path; {_HUB}"
    if any(character in value for character in _PATTERN_CHARACTERS):
        folder = path.parent
        while any(character in str(folder) for character in _PATTERN_CHARACTERS):
            folder = folder.parent
        return (
            f"data.{split}: {path} is a pattern, but DVC needs a path; set data.{split}: {folder} "
            f"and data.{split}_files: {path.relative_to(folder)}"
        )
    missing = f"data.{split}: {explain_missing_file(path)}"
    looks_like_an_id = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and suffix_of(path) not in SUFFIXES
    return f"{missing}; {_HUB}" if looks_like_an_id else missing


def _without_metadata(files: list[Path]) -> list[Path]:
    """Return files without those that `Dataset.save_to_disk` writes beside the rows."""
    names = {"dataset_info.json", "state.json", "dataset_dict.json"}
    if not any(suffix_of(file) == ".arrow" for file in files):
        return files
    return [file for file in files if file.name not in names]


def _files_below(directory: Path) -> list[Path]:
    """Return all files except hidden ones, including those in linked folders."""
    found: list[Path] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link cycle
            folders.clear()
            continue
        visited.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith((".", "_"))]
    return sorted(found)


def _parts(directory: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(directory).parts


def _matching(
    directory: Path, pattern: str, readable: Sequence[Path], split: str, problems: list[str]
) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        problems.append(
            f"data.{split}_files = {pattern} is outside {directory}; use a relative path without .."
        )
        return []
    chosen = set(directory.glob(pattern))
    found = [path for path in readable if path in chosen]
    if not found:
        near = ", ".join(path.name for path in readable[:10]) or "none"
        problems.append(
            f"data.{split}_files = {pattern} matches no readable file in {directory}; "
            f"readable files: {near}"
        )
    return found


def _splits_in_directory(
    directory: Path, readable: Sequence[Path], problems: list[str]
) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    similar: list[Path] = []
    for path in readable:
        parts = [part.casefold() for part in (*_parts(directory, path)[:-1], stem_of(path))]
        if shard := _SHARD.fullmatch(parts[-1]):
            parts[-1] = shard[1]
        splits = {SPLIT_OF[part] for part in parts if part in SPLIT_OF}
        if len(splits) == 1:
            named.setdefault(splits.pop(), []).append(path)
        elif splits or any(word in SPLIT_OF for part in parts for word in _WORDS.split(part)):
            similar.append(path)
    if similar:
        listed = ", ".join(path.relative_to(directory).as_posix() for path in similar[:10])
        problems.append(
            f"{directory}: {listed} may be a split, but the name is not exactly train, validation "
            "or test; set data.train_files, data.validation_files and data.test_files, and set "
            "data.validation and data.test to the directory as well"
        )
    for split, found in named.items():
        # One file, shards or the files of a folder are allowed, but not train.csv and train.jsonl.
        top = [path for path in found if not _SHARD.fullmatch(stem_of(path))]
        stems = [path.with_name(stem_of(path)) for path in top]
        if len(set(stems)) < len(stems) or (len(top) < len(found) and top):
            listed = ", ".join(path.relative_to(directory).as_posix() for path in found)
            problems.append(f"{directory} has more than one {split} file: {listed}")
    if not named:
        return {"train": list(readable)}
    if "train" not in named:
        listed = ", ".join(path.relative_to(directory).as_posix() for path in readable[:10])
        problems.append(
            f"data.train: {directory} has files for {' and '.join(named)}, but no file or folder "
            f"is named train; readable files: {listed}"
        )
    return named
