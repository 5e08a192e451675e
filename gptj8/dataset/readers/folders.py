"""What the names of folders and files say: splits, and the labels of the texts in them."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gptj8.dataset.readers.text_files import COMPRESSIONS, TEXT_SUFFIXES, suffix_of

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}

_UNLABELLED = ("unsup", "unsupervised", "unlabeled", "unlabelled")


def stem_of(path: Path) -> str:
    """Return a file's name without its suffixes: `train` of `train.csv.gz`."""
    name = path.name  # strings, because a folder may have 100,000 files
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem)[0] if suffix.lower() in COMPRESSIONS else stem


def label_of_folder(path: Path) -> str | None:
    """Return a text's label: the name of its innermost folder that is not named as a split."""
    return _label_of(path.parent)


def is_unlabelled(path: Path) -> bool:
    """Return whether the folder's name says that its texts have no label, as aclImdb's `unsup`."""
    return (label_of_folder(path) or "").casefold() in _UNLABELLED


def texts_by_label(directory: Path, files: Sequence[Path]) -> list[Path]:
    """Return the text files that are in folders for labels; none if there are no such folders.

    There are if at least two folders, apart from those named as splits, have several text files
    each, these are most of the text files, and none of them is named as a split.
    """
    texts = [path for path in files if suffix_of(path) in TEXT_SUFFIXES]
    inside = [path for path in texts if _has_label(directory, path.parent)]
    counts = Counter(label_of_folder(path) for path in inside if not is_unlabelled(path))
    labels = [label for label, count in counts.items() if count > 1]
    is_split = any(stem_of(path).casefold() in SPLIT_OF for path in inside)
    return inside if len(labels) > 1 and 2 * len(inside) > len(texts) and not is_split else []


@functools.lru_cache(maxsize=1024)
def _label_of(folder: Path) -> str | None:
    return next((name for name in reversed(folder.parts) if name.casefold() not in SPLIT_OF), None)


@functools.lru_cache(maxsize=1024)
def _has_label(directory: Path, folder: Path) -> bool:
    parts = folder.relative_to(directory).parts
    return sum(part.casefold() not in SPLIT_OF for part in parts) == 1
