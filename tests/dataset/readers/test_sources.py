"""Tests of finding the files of each split, and of comparing texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gptj8.dataset.readers.sources import content_key, find_sources
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.row_files import write_rows


def test_all_missing_files_are_reported_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.csv")
    data = Data(train=str(tmp_path / "mime.csv"), test=str(tmp_path / "no" / "x.csv"))
    with pytest.raises(UserError) as caught:
        find_sources(data)
    assert str(caught.value).splitlines() == [
        f"data.train: {tmp_path / 'mime.csv'} does not exist, did you mean mine.csv?",
        f"data.test: {tmp_path / 'no' / 'x.csv'} does not exist",
    ]


def found(folder: Path, **data: object) -> dict[str, list[str]]:
    """Return the files that would be read, relative to the folder."""
    files, ignored, _ = find_sources(Data(**{"train": str(folder)} | data))
    named = dict(files) | ({"ignored": ignored} if ignored else {})
    return {
        split: [path.relative_to(folder).as_posix() for path in paths]
        for split, paths in named.items()
    }


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_named_after_splits_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "dev.jsonl.gz", "Test.parquet", "notes.csv", "README.md")
    assert found(tmp_path) == {
        "train": ["train.csv"],
        "validation": ["dev.jsonl.gz"],
        "test": ["Test.parquet"],
        "ignored": ["README.md", "notes.csv"],
    }


def test_folders_named_after_splits_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.csv", "train/a.csv", "test/x.csv", "train/.hidden.csv")
    assert found(tmp_path) == {"train": ["train/a.csv", "train/b/1.csv"], "test": ["test/x.csv"]}


def test_hub_repository_layout_is_read(tmp_path: Path) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    names += ["test-00000-of-00001.parquet"]
    touch(tmp_path, "README.md", *(f"data/{name}" for name in names))
    assert found(tmp_path) == {
        "train": [f"data/{name}" for name in names[:2]],
        "test": [f"data/{names[2]}"],
        "ignored": ["README.md"],
    }
    (tmp_path / "data" / names[0]).unlink()
    with pytest.raises(UserError, match="data/train: 1 of 2 shards are missing: 00000"):
        found(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["sst2_train.csv", "sst2_test.csv"],
        ["train.csv", "train_part2.csv", "test.csv"],
        ["train/test.csv"],
        ["a.csv", "my-dev-set/b.csv"],
    ],
)
def test_ambiguous_split_names_raise(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=r"may be a split, but the name is not.*data\.train_files"):
        found(tmp_path)


def test_linked_folders_are_read(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.csv")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data") == {"train": ["train/a.csv"]}


def test_file_name_that_is_not_utf_8_raises(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.csv").touch()
    with pytest.raises(UserError, match="the file name is not UTF-8; rename it"):
        found(tmp_path)


def test_directory_without_split_names_is_all_train(tmp_path: Path) -> None:
    touch(tmp_path, "2024/b.csv", "2024/a.csv.zst", "2025/c.csv", "2025/_SUCCESS")
    assert found(tmp_path) == {"train": ["2024/a.csv.zst", "2024/b.csv", "2025/c.csv"]}
    touch(tmp_path, "2025/d.xlsx", "2025/e.csv.lz4")
    assert found(tmp_path)["ignored"] == ["2025/d.xlsx", "2025/e.csv.lz4"]


def test_patterns_select_files_in_a_directory(tmp_path: Path) -> None:
    touch(tmp_path, "2024/b.csv", "2024/a.csv.gz", "2025/c.csv", "d.csv")
    assert found(tmp_path, train_files="2024/*") == {
        "train": ["2024/a.csv.gz", "2024/b.csv"],
        "ignored": ["2025/c.csv", "d.csv"],
    }
    both = {"train_files": "2024/*.csv", "test": str(tmp_path), "test_files": "**/c.csv"}
    assert found(tmp_path, **both) == {
        "train": ["2024/b.csv"],
        "test": ["2025/c.csv"],
        "ignored": ["2024/a.csv.gz", "d.csv"],
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_files": "*.parquet"}, "matches no readable file.*readable files: a.csv"),
        ({"train_files": "../*.csv"}, "is outside"),
        ({"train_files": "*.csv", "test_files": "*.csv"}, "needs a directory in data.test"),
        ({"test": "a.csv", "test_files": "a*"}, "needs a directory, but .*a.csv is a file"),
        ({"test": "a.csv"}, "a.csv is in both data.train and data.test"),
        ({"train": "*.csv"}, r"set data.train: .* and data.train_files: \*.csv"),
        ({"train": "hf://datasets/a/b"}, "hf://datasets/a/b is not a path; .*hub/params.yaml"),
    ],
)
def test_invalid_paths_and_patterns_raise(tmp_path: Path, data: dict, message: str) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    paths = {
        key: str(tmp_path / value)
        for key, value in data.items()
        if "files" not in key and "://" not in value
    }
    with pytest.raises(UserError, match=message):
        found(tmp_path, **data | paths)


def test_explicit_file_overrides_the_file_in_the_directory(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "test.csv", "own.csv")
    assert found(tmp_path, test=str(tmp_path / "own.csv")) == {
        "train": ["train.csv"],
        "test": ["own.csv"],
        "ignored": ["test.csv"],
    }


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    names = [f"train-0000{index}-of-00002.csv" for index in (1, 0)]
    touch(tmp_path, *names)
    assert found(tmp_path) == {"train": sorted(names)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tain.csv", "test.csv"], "no file or folder is named train.*readable files: tain.csv"),
        (["train.csv", "train.jsonl"], "more than one train file: train.csv, train.jsonl"),
    ],
    ids=["none", "two"],
)
def test_directory_without_exactly_one_train_file_raises(
    tmp_path: Path, names: list, message: str
) -> None:
    for name in names:
        write_rows(tmp_path / name)
    with pytest.raises(UserError, match=message):
        find_sources(Data(train=str(tmp_path)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a  b\n", " a b", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("a\u00a0b", "a b", True),
        ("a b", "ab", False),
        ("Case", "case", False),
        ("stop.", "stop", False),
    ],
)
def test_content_key_ignores_only_white_space_and_unicode_form(
    one: str, other: str, same: bool
) -> None:
    assert (content_key(one) == content_key(other)) is same


def test_content_key_is_the_sha256_of_plain_text() -> None:
    assert content_key("plain text") == hashlib.sha256(b"plain text").digest()
