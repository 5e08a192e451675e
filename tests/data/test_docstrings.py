"""Tests of the docstrings recipe: which texts it extracts and drops, and that splits do not leak.

The recipe runs as in DVC, `python extract.py` next to its params.yaml, on small generated packages
and once on the installed libraries. Similarity is computed with scikit-learn over all pairs,
independently of the recipe's own search.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ruamel.yaml import YAML
from sklearn.feature_extraction.text import CountVectorizer

from gptj8.dataset.validation.near_duplicates import normalize
from gptj8.params.sections import Data
from tests.helpers.paths import ROOT

RECIPE = ROOT / "data" / "datasets" / "docstrings"
SIZES = {"train_per_class": 12, "validation_per_class": 4, "test_per_class": 6}


@pytest.fixture(scope="module")
def extract() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docstrings_extract", RECIPE / "extract.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up the module by name
    spec.loader.exec_module(module)
    return module


def sentence(rng: random.Random, words: int = 20) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(words))


def write_package(root: Path, name: str, texts: list[str]) -> None:
    """Write a package whose methods have these docstrings, ten per file."""
    folder = root / name
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the recipe must not import this')\n")
    (folder / "tests" / "test_it.py").write_text(
        f'"""{"A test suite is no documentation. " * 5}"""'
    )
    methods = [f"    def f{k}(self):\n        {text!r}\n" for k, text in enumerate(texts)]
    for start in range(0, len(texts), 10):
        source = "class C:\n" + "\n".join(methods[start : start + 10])
        (folder / f"part_{start:03}.py").write_text(source)


def write_recipe(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(RECIPE / "extract.py", folder)
    params = YAML(typ="safe").load(RECIPE / "params.yaml") | changes
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


def run(folder: Path, packages: Path, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(packages), str(RECIPE.parents[2])])
    env = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "extract.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(folder: Path) -> dict[str, bytes]:
    paths = sorted([*folder.glob("splits/*"), folder / "corpus.jsonl"])
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def most_similar(left: list[str], right: list[str]) -> float:
    """Return the maximum similarity between the two lists, as defined by `validate`."""
    left, right = ([normalize(text) for text in texts] for texts in (left, right))
    count = CountVectorizer(
        binary=True, analyzer="char", ngram_range=(5, 5), lowercase=False, dtype=np.float32
    ).fit(left + right)
    a, b = count.transform(left), count.transform(right)
    both = (a @ b.T).toarray()
    either = a.sum(axis=1).reshape(-1, 1) + b.sum(axis=1).reshape(1, -1) - both
    return float((both / np.maximum(np.asarray(either), 1)).max())


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages of 60 texts each, with repeated, near-duplicate and shared texts."""
    root = tmp_path_factory.mktemp("packages")
    rng = random.Random(0)
    shared = sentence(rng)
    for name in ("alpha", "beta"):
        texts = [sentence(rng) for _ in range(50)]
        near = [text + f" number {rng.randrange(10)}" for text in texts[:8]]
        write_package(root, name, [*texts, *near, texts[20], shared])
    return root


@pytest.fixture(scope="module")
def made(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    result = run(write_recipe(folder, libraries=["alpha", "beta"], **SIZES), packages)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's output for the installed libraries, with the default params."""
    folder = write_recipe(tmp_path_factory.mktemp("docstrings"))
    result = run(folder, folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_splits_and_corpus_have_the_expected_sizes(made: Path) -> None:
    for name in ("train", "validation", "test"):
        labels = Counter(row["label"] for row in read(made / "splits" / f"{name}.jsonl"))
        assert labels == dict.fromkeys(("alpha", "beta"), SIZES[f"{name}_per_class"])
    # 50 different texts per library: near-duplicates, the repeat and the shared text are dropped.
    assert len(read(made / "corpus.jsonl")) == 2 * (50 - 4 - 6)


def test_text_shared_by_two_libraries_is_dropped(made: Path, packages: Path) -> None:
    last = (packages / "alpha" / "part_050.py").read_text().splitlines()[-1].strip().strip("'")
    assert last in (packages / "beta" / "part_050.py").read_text()
    assert not any(last.encode() in data for data in outputs(made).values())


def test_output_does_not_depend_on_the_hash_seed(
    made: Path, packages: Path, tmp_path: Path
) -> None:
    again = write_recipe(tmp_path, libraries=["alpha", "beta"], **SIZES)
    assert run(again, packages, hash_seed="12345").returncode == 0
    assert outputs(again) == outputs(made)


def test_rows_of_a_library_do_not_depend_on_other_libraries(
    made: Path, packages: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    shutil.copytree(packages / "alpha", tmp_path / "packages" / "alpha")
    write_package(tmp_path / "packages", "gamma", [sentence(rng) for _ in range(40)])
    folder = write_recipe(tmp_path / "recipe", libraries=["alpha", "gamma"], **SIZES)
    assert run(folder, tmp_path / "packages").returncode == 0

    # The text that was shared with beta is now a row; no other row may change its split.
    for name in ("validation", "test"):
        old, new = (
            {row["text"] for row in read(where / f"splits/{name}.jsonl") if row["label"] == "alpha"}
            for where in (made, folder)
        )
        assert len(old - new) <= 1


@pytest.mark.parametrize(
    ("changes", "named", "lines"),
    [
        ({"libraries": ["alpha", "no_such_library"]}, ["no_such_library", "requirements.txt"], 1),
        ({"libraries": ["alpha", "beta.gamma"]}, ["'beta.gamma' is not the name"], 1),
        ({"libraries": ["alpha", "alpha"]}, ["a library is listed twice"], 1),
        ({"train_per_class": 500}, ["alpha has", "beta has"], 1),
        ({"max_similarity": "high", "mx_chars": 3}, ["max_similarity", "mx_chars"], 2),
    ],
)
def test_invalid_params_give_one_line_each_and_leave_no_files(
    packages: Path, tmp_path: Path, changes: dict[str, object], named: list[str], lines: int
) -> None:
    folder = write_recipe(tmp_path, **({"libraries": ["alpha", "beta"]} | SIZES | changes))
    result = run(folder, packages)
    assert result.returncode == 2
    problems = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(problems) == lines and all(name in "\n".join(problems) for name in named)
    assert "Traceback" not in result.stderr
    assert {path.name for path in folder.iterdir()} == {"extract.py", "params.yaml"}


def test_docstrings_are_in_source_order_with_methods_and_conditionals(
    extract: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""module text"""\n'
        "if True:\n"
        "    def first():\n        '''first text'''\n        def inner(): 'inner text'\n"
        "class Second:\n    '''second text'''\n    async def third(self): 'third text'\n"
        "def none(): pass\n"
    )
    assert extract.docstrings(path, min_chars=5, max_chars=100) == [
        "module text",
        "first text",
        "second text",
        "third text",
    ]
    assert extract.docstrings(path, min_chars=11, max_chars=100) == ["module text", "second text"]


def test_file_with_newer_syntax_is_skipped(extract: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "newer.py"
    path.write_text('"""text of a module that does not parse"""\ndef def\n')
    with pytest.raises(SyntaxError):
        ast.parse(path.read_text())
    assert extract.docstrings(path, min_chars=1, max_chars=100) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  short \n", "short"),
        ("one\nsecond linear", "one\nsecond"),  # the line end is too early, so cut at a word
        ("0123456789\nsecond line", "0123456789"),
        ("0" * 30, "0" * 15),
        ("0123456789 12345 789", "0123456789"),
    ],
)
def test_text_is_cut_at_a_line_or_word_end(extract: ModuleType, text: str, expected: str) -> None:
    assert extract.opening(text, 15) == expected


@pytest.mark.slow
def test_real_splits_have_enough_rows_per_library(real: Path) -> None:
    counts = {
        name: Counter(row["label"] for row in read(real / "splits" / f"{name}.jsonl"))
        for name in ("train", "validation", "test")
    }
    assert all(len(labels) == 6 for labels in counts.values())
    assert max(counts["train"].values()) <= 400
    assert min(counts["test"].values()) >= 50


@pytest.mark.slow
def test_real_splits_and_corpus_have_no_duplicates_or_near_duplicates(real: Path) -> None:
    texts = {
        path.stem: [row["text"] for row in read(path)]
        for path in (*real.glob("splits/*"), real / "corpus.jsonl")
    }
    limit = Data.model_fields["near_duplicate_threshold"].default
    for name, found in texts.items():
        assert len(set(found)) == len(found), name
    assert set(texts["train"]) <= set(texts["corpus"])
    assert most_similar(texts["test"], texts["corpus"]) < limit
    assert most_similar(texts["validation"], texts["corpus"]) < limit
    assert most_similar(texts["test"], texts["validation"]) < limit


@pytest.mark.slow
def test_real_corpus_keeps_source_order(real: Path) -> None:
    sources = [row["source"] for row in read(real / "corpus.jsonl")]
    libraries = [library for library, _ in itertools.groupby(s.split("/")[0] for s in sources)]
    assert libraries == YAML(typ="safe").load(real / "params.yaml")["libraries"]
    assert len(list(itertools.groupby(sources))) == len(set(sources))
