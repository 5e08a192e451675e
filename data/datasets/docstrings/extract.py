"""Make the default dataset: docstrings of installed libraries, labelled with their library.

The source files are parsed with `ast` and never imported. requirements.txt pins the versions of the
libraries, so DVC tracks that file: the same pins give byte-identical outputs.

A row is the start of a docstring, at most `max_chars` long. Equal rows and near-duplicates form a
group (found by `gptj8.dataset.validation.near_duplicates`, as in `validate`). One row per group is
kept; a group that spans libraries is dropped, because its label would be a guess. The remaining
rows are split by the hash of their text. So no text or near-duplicate is in two splits, and a new
version of one library does not change the splits of the others.

Outputs: `splits/{train,validation,test}.jsonl` (`text`, `label`), and `corpus.jsonl` (`text`,
`source`) for training a base model. The corpus has every row outside validation and test, in the
order of the source files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gptj8.dataset.validation.near_duplicates import band_hashes, banding, find_similar, normalize
from gptj8.params.yaml_files import Section, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory, replace_file
from gptj8.runtime.process import run
from gptj8.runtime.progress import each
from gptj8.runtime.story import Story

HERE = Path(__file__).resolve().parent
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
SPLITS = ("train", "validation", "test")
CORPUS = "corpus.jsonl"


class Params(Section):
    """The keys of params.yaml, which documents them."""

    libraries: Annotated[tuple[str, ...], Field(min_length=2)]
    skip_folders: tuple[str, ...]
    min_chars: Annotated[int, Field(ge=1)]
    max_chars: Annotated[int, Field(ge=1)]
    max_similarity: Annotated[float, Field(gt=0, lt=1)]
    train_per_class: Annotated[int, Field(ge=1)]
    validation_per_class: Annotated[int, Field(ge=1)]
    test_per_class: Annotated[int, Field(ge=1)]

    @field_validator("libraries")
    @classmethod
    def check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in names if not name.isidentifier() or name == "__main__"]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not the name of an installed package")
        if len(set(names)) < len(names):
            raise ValueError("a library is listed twice")
        return names


@dataclass(frozen=True)
class Row:
    """The start of one docstring, and its source file (`pandas/core/frame.py`)."""

    text: str
    label: str
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_libraries(names: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each installed library, without importing it.

    Raises:
        UserError: with every library that is not installed.
    """
    roots: dict[str, Path] = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            roots[name] = Path(spec.submodule_search_locations[0])
    missing = [name for name in names if name not in roots]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}; run `pip install -r requirements.txt`"
        )
    return roots


def source_files(root: Path, skip_folders: Sequence[str]) -> list[Path]:
    """Return the library's Python files, sorted so that the file system has no influence."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in files if not set(path.parts[:-1]) & set(skip_folders)]
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def definitions(body: Iterable[ast.stmt]) -> Iterator[Definition]:
    """Yield classes and functions in source order, including methods and conditional definitions.

    Function bodies are skipped: nested definitions are not documentation, and `ast.walk` over every
    expression takes three times as long.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield node
            yield from definitions(node.body)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from definitions(node.body)


def opening(text: str, max_chars: int) -> str:
    """Cut the text to `max_chars` at the last line end, or at a word end if that is too early."""
    text = text.strip()
    if len(text) <= max_chars:
        return text
    head = text[: max_chars + 1]
    at = head.rfind("\n")
    if at < max_chars // 2:
        at = max(head.rfind(" "), at)
    return head[: at if at > 0 else max_chars].rstrip()


def docstrings(path: Path, min_chars: int, max_chars: int) -> list[str]:
    """Return the starts of a file's docstrings, in source order.

    The result is empty for a file that needs a newer Python; libraries ship such files behind
    version checks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in library code
        try:
            module = ast.parse(path.read_bytes())
        except SyntaxError:
            return []
    texts = (ast.get_docstring(node) or "" for node in (module, *definitions(module.body)))
    cut = (opening(text, max_chars) for text in texts)
    return [text for text in cut if len(text) >= min_chars]


def extract(roots: dict[str, Path], params: Params) -> list[Row]:
    """Return the rows of all libraries, ordered by library, file and line."""
    files = [
        (label, root, path)
        for label, root in roots.items()
        for path in source_files(root, params.skip_folders)
    ]
    read = partial(docstrings, min_chars=params.min_chars, max_chars=params.max_chars)
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(read, [path for *_, path in files], chunksize=32)
        texts = each(found, len(files), "read", "files")
        return [
            Row(text, label, f"{label}/{path.relative_to(root).as_posix()}")
            for (label, root, path), found in zip(files, texts, strict=True)
            for text in found
        ]


def similar_pairs(texts: Sequence[str], max_similarity: float) -> np.ndarray:
    """Return the pairs (pairs x 2) of texts with at least this similarity, as in `validate`."""
    normalized = [normalize(text) for text in texts]
    hashes = band_hashes(normalized, *banding(max_similarity, len(texts)))
    one_group = np.zeros(len(texts), dtype=np.uint8)
    shown = each(hashes, len(hashes), "compare", "bands")
    return find_similar(shown, one_group, normalized.__getitem__, max_similarity)[0]


def deduplicate(rows: Sequence[Row], max_similarity: float) -> list[Row]:
    """Keep the first row of each group of equal or similar rows if the group has one label.

    Groups are connected components of the similarity graph, so no two kept rows are similar, for
    any order of the libraries.
    """
    labels: dict[str, set[str]] = {}
    unique: dict[str, Row] = {}
    for row in rows:
        labels.setdefault(row.text, set()).add(row.label)
        unique.setdefault(row.text, row)
    first = list(unique.values())

    pairs = similar_pairs([row.text for row in first], max_similarity)
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(first), len(first)))
    group = connected_components(graph, directed=False)[1]

    group_labels: dict[int, set[str]] = {}
    for row, number in zip(first, group, strict=True):
        group_labels.setdefault(number, set()).update(labels[row.text])
    kept: dict[int, Row] = {}
    for row, number in zip(first, group, strict=True):
        if len(group_labels[number]) == 1:
            kept.setdefault(number, row)
    return list(kept.values())


def split(rows: Sequence[Row], params: Params) -> dict[str, list[Row]]:
    """Split the rows by the hash of their text, with the same number of rows per label.

    Returns:
        The rows of train, validation and test in hash order, which mixes the labels, and under
        `corpus` all rows outside validation and test, in the given order.

    Raises:
        UserError: with each label that has too few rows.
    """
    ordered = sorted(rows, key=lambda row: row.digest)
    sizes = {
        "test": params.test_per_class,
        "validation": params.validation_per_class,
        "train": params.train_per_class,
    }
    counts = Counter(row.label for row in rows)
    needed = sum(sizes.values())
    short = [f"{label} has {n}" for label, n in sorted(counts.items()) if n < needed]
    short += [f"{label} has 0" for label in params.libraries if label not in counts]
    if short:
        raise UserError(
            f"each library needs {needed} different docstrings, but {', '.join(short)}; lower "
            "train_per_class, validation_per_class or test_per_class"
        )

    splits: dict[str, list[Row]] = {name: [] for name in sizes}
    seen: Counter[str] = Counter()
    bounds = [(name, sum(list(sizes.values())[: k + 1])) for k, name in enumerate(sizes)]
    for row in ordered:
        name = next((name for name, bound in bounds if seen[row.label] < bound), None)
        seen[row.label] += 1
        if name:
            splits[name].append(row)
    held_out = {row.text for name in ("validation", "test") for row in splits[name]}
    splits["corpus"] = [row for row in rows if row.text not in held_out]
    return splits


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(splits: dict[str, list[Row]], folder: Path) -> None:
    """Write splits/ and corpus.jsonl into the folder, each atomically."""
    with replace_directory(folder / "splits") as staging, replace_file(folder / CORPUS) as corpus:
        for key in SPLITS:
            rows = [{"text": row.text, "label": row.label} for row in splits[key]]
            write_jsonl(staging / f"{key}.jsonl", rows)
        rows = [{"text": row.text, "source": row.source} for row in splits["corpus"]]
        write_jsonl(corpus, rows)


def main(folder: Path = HERE) -> None:
    story = Story("extract")
    params = read_checked(Params, folder / "params.yaml")
    story.say(f"a labelled dataset of docstrings from {len(params.libraries)} installed libraries")
    rows = extract(find_libraries(params.libraries), params)
    kept = deduplicate(rows, params.max_similarity)
    splits = split(kept, params)
    write(splits, folder)
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in (*SPLITS, "corpus"))
    story.end(f"{len(rows):,} docstrings, {len(kept):,} without near-duplicates: {sizes}")


if __name__ == "__main__":
    run(main)
