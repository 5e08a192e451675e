"""Reading files, holding out splits, and the prepared dataset on disk."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared_dataset import write_prepared

from gptj8.dataset import SPLITS, load_prepared
from gptj8.errors import UserError
from gptj8.formats import read_batches, read_rows
from gptj8.params import Data
from gptj8.prompts import TextEncoder
from gptj8.relations import hold_out
from gptj8.sources import content_key, find_sources

BOTH = {"text": "text", "label": "label"}
ROWS = [
    ("It's a test, isn't it?", "spam"),
    ('two\nlines and a "quote"', "not spam"),
    ("naïve — 漢字 🙂", "spam"),
]


def write_csv(
    path: Path, header: list[str], rows: list, delimiter: str = ",", bom: bool = False
) -> Path:
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return path


def write_rows(path: Path) -> Path:
    """Write ROWS in the format of the suffix, by other means than the code under test."""
    records = [{"text": text, "label": label} for text, label in ROWS]
    if path.suffix in (".csv", ".tsv"):
        return write_csv(path, ["text", "label"], ROWS, "," if path.suffix == ".csv" else "\t")
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        pd.DataFrame(records).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"data.{suffix}")
    rows = read_rows(path, BOTH)
    assert list(zip(rows["text"], rows["label"], strict=True)) == ROWS
    assert set(rows["text_kind"]) == set(rows["label_kind"]) == {"text"}
    assert list(rows["row"]) == [1, 2, 3]
    assert set(rows["file"]) == {path.as_posix()}


def test_the_user_s_column_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "class", "tweet"], [["7", "very good", "hello"]])
    rows = read_rows(path, {"text": "tweet", "label": "class"})
    assert rows[["text", "label"]].values.tolist() == [["hello", "very good"]]


def test_one_column_may_serve_two_fields(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a"], [["x"]])
    rows = read_rows(path, {"prompt": "a", "completion": "a"})
    assert rows[["prompt", "completion"]].values.tolist() == [["x", "x"]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    content = {".csv": "text\nhello\n", ".jsonl": '{"text": "hello"}\n', ".txt": "hello\n"}[suffix]
    path = tmp_path / f"bom{suffix}"
    path.write_text(content, encoding="utf-8-sig")
    assert list(read_rows(path, {"text": "text"})["text"]) == ["hello"]


def test_csv_cells_are_taken_as_written(tmp_path: Path) -> None:
    cells = ["007", "NA", "null", "1e5", "=1+1", " padded ", ""]
    path = write_csv(tmp_path / "t.csv", ["text", "label"], [["x", cell] for cell in cells])
    assert list(read_rows(path, BOTH)["label"]) == cells


def test_blank_lines_are_skipped_and_json_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n\na,b\n\n   \nc,d\n")
    assert list(read_rows(tmp_path / "t.csv", BOTH)["row"]) == [1, 2]
    (tmp_path / "t.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", {"text": "text"})["row"]) == [2, 4]
    (tmp_path / "t.txt").write_text("a\n\n \nb")
    rows = read_rows(tmp_path / "t.txt", {"text": "content"})
    assert list(zip(rows["row"], rows["text"], strict=True)) == [(1, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("cell", "text", "kind"),
    [
        ("text", "text", "text"),
        (3, "3", "integer"),
        (3.0, "3", "integer"),
        (3.5, "3.5", "number"),
        (True, "true", "boolean"),
        (None, None, "missing"),
        (float("nan"), None, "missing"),
        (["a", 1], '["a", 1]', "list"),
        ({"a": None}, '{"a": null}', "object"),
    ],
)
def test_json_cells_keep_their_kind(tmp_path: Path, cell: object, text: str, kind: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": "first"}\n' + json.dumps({"a": cell}) + "\n{}\n")
    rows = read_rows(path, {"text": "a"})
    value = rows["text"][1]
    assert (value == text) if text is not None else pd.isna(value)
    assert list(rows["text_kind"]) == ["text", kind, "missing"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", {"text": "text"})["text"]) == ["a\ufffd", "🙂"]


def test_parquet_labels_by_name(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    content = {"text": ["a", "b"], "label": [1, 0]}
    Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "t.parquet"))
    assert list(read_rows(tmp_path / "t.parquet", BOTH)["label"]) == ["good", "bad"]


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([1, 2]), "label": pa.array([1.0, None])})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_rows(tmp_path / "t.parquet", BOTH)
    assert list(rows["text_kind"]) == ["integer", "integer"]
    assert list(rows["label_kind"]) == ["integer", "missing"]
    assert rows["label"][0] == "1"


DAMAGED = {
    "empty": ("t.csv", b"", "is empty"),
    "header-only": ("t.csv", b"text,label\n", "has no rows"),
    "blank-jsonl": ("t.jsonl", b"\n\n", "has no rows"),
    "empty-array": ("t.json", b"[]", "has no rows"),
    "utf-16": ("t.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16"),
    "utf-16-without-mark": ("t.csv", "text,label\na,b\n".encode("utf-16-le"), "is UTF-16"),
    "open-quote": (
        "t.csv",
        b'text,label\na,b\n"c,d\ne,f\n',
        "line 3 column 1: a quote is opened and never closed",
    ),
    "stray-quote": (
        "t.csv",
        b'text,label\r\nx,"a\nb" c\n',
        "line 3 column 3: text follows a closing quote",
    ),
    "latin-1-header": ("t.csv", b"text,caf\xe9\na,b\n", "line 1: its column names are not UTF-8"),
    "repeated-column": ("t.csv", b"text,label,text\na,b,c\n", "more than one column text"),
    "semicolons": ("t.csv", b"text;label\na;b\n", "separated by commas?"),
    "json-array": ("t.json", b'[{"text": "a"},\n {"text" 1}]', "line 2 column 10"),
    "pretty-json": ("t.jsonl", b'{\n"text": "a"\n}\n', "has an object on each line"),
    "not-parquet": ("t.parquet", b"PAR1 is not enough", "is not a Parquet file"),
    "not-gzip": ("t.csv.gz", b"text,label\na,b\n", "cannot be decompressed"),
    "truncated-gzip": ("t.csv.gz", gzip.compress(b"text,label\na,b\n")[:-9], "decompressed"),
    "truncated-xz": ("t.csv.xz", lzma.compress(b"text,label\na,b\n")[:-9], "decompressed"),
    "packed-parquet": ("t.parquet.gz", gzip.compress(b"PAR1"), "unpack .gz first"),
    "no-columns": ("t.txt", b"hello\n", "plain text and has no columns"),
    "spreadsheet": ("t.xlsx", b"PK", ".xlsx is not one of .csv"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_by_name_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(path, BOTH)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "content", "warnings"),
    [
        ("t.tsv", 'text\tlabel\n"a\tx\nb\tx\nit the "\tx\nd\tx\n', {1: "3 rows .* line 2"}),
        ("t.csv", 'text,label\nz,x\n"a,x\nb,x\nc,x\nit ",x\n', {2: "4 rows .* line 3"}),
        ("t.csv", 'id,text,label\n1,"a,x\n2,b,x\n3,it ",x\n', {1: "3 rows .* line 2"}),
        ("t.csv", 'text,label\n"Hello, world\nbye",x\n"one, two\nbuckle, my\nshoe",y\n', {}),
        ("t.csv", 'text,label\n"a\n\nb",x\n"""quoted"", he\nsaid",y\n', {}),
    ],
)
def test_rows_joined_by_a_stray_quote_are_pointed_at(
    tmp_path: Path, name: str, content: str, warnings: dict[int, str]
) -> None:
    (tmp_path / name).write_text(content)
    rows = read_rows(tmp_path / name, BOTH)
    found = rows[rows["warning"].notna()].set_index("row")["warning"].to_dict()
    assert found.keys() == warnings.keys()
    assert all(re.search(pattern, found[row]) for row, pattern in warnings.items())


MALFORMED = {
    "too-many-cells": ("t.csv", b"text,label\na,b\n\na,b,c\nd,e\n", "has 3 cells on line 4"),
    "too-few-cells": ("t.csv", b'text,label\n"a\nb",c\na\nd,e\n', "has 1 cells on line 4"),
    "truncated-json": (
        "t.jsonl",
        b'{"text": "a", "label": "b"}\n{"text"\n{"text": "d", "label": "e"}',
        "at column 8",
    ),
    "list-line": ("t.jsonl", b'{"text": "a"}\n[1]\n{"label": 1}\n', "is not a JSON object"),
    "huge-integer": ("t.jsonl", b'{"label": 1}\n' + b"1" * 5000 + b"\n{}", "is not usable JSON"),
    "deep-json": ("t.jsonl", b'{"label": 1}\n' + b"[" * 99999 + b"\n{}", "is not usable JSON"),
    "key-twice": (
        "t.jsonl",
        b'{"label": 1}\n{"label": 1, "label": 2}\n{"label": 3}',
        "has the key label twice",
    ),
    "element": ("t.json", b'[{"text": "a", "label": 1}, 2, {}]', "is not a JSON object"),
}


@pytest.mark.parametrize(("name", "content", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_a_row_that_cannot_be_taken_apart_says_why(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    columns = BOTH if b"text" in content else {"label": "label"}
    rows = read_rows(tmp_path / name, columns)
    assert list(rows["row"]) == [1, 2, 3]
    assert list(rows["problem"].isna()) == [True, False, True]
    assert problem in rows["problem"][1]
    assert rows["label_kind"][1] == "missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"text,label\na,b\ncaf\xe9,b\nc,d\n"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "c", "label": "d"}\n'),
        ("t.txt", b"a\ncaf\xe9\nc\n"),
    ],
)
def test_bytes_that_are_not_utf_8_are_a_matter_of_their_cell(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = read_rows(tmp_path / name, {"text": "text"})
    assert list(rows["text_kind"]) == ["text", "undecodable", "text"]
    assert list(rows["text"]) == ["a", "caf\ufffd", "c"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda content: pa.Codec("zstd").compress(content, asbytes=True)),
    ],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_compressed_files_are_what_they_hold(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_rows(tmp_path / name)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(compress(plain.read_bytes()))
    rows = read_rows(packed, BOTH)
    assert rows["file"].unique().tolist() == [packed.as_posix()]
    pd.testing.assert_frame_equal(
        rows.drop(columns="file"), read_rows(plain, BOTH).drop(columns="file")
    )


def test_a_file_is_a_row_of_plain_text_on_request(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"one\r\n\ntwo\n")
    rows = read_rows(tmp_path / "t.txt", {"text": "text"}, text_row="file")
    assert rows[["row", "text"]].values.tolist() == [[1, "one\n\ntwo\n"]]


def test_batches_are_the_whole_and_report_every_byte(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["text"], [[f"row {i}"] for i in range(10_000)])
    done: list[int] = []
    batches = list(read_batches(path, {"text": "text"}, advance=done.append))
    assert [len(batch) for batch in batches] == [4096, 4096, 1808]
    assert sum(done) == path.stat().st_size and len(done) == 3
    assert [text for b in batches for text in b["text"]] == [f"row {i}" for i in range(10_000)]


def test_damaged_parquet_pages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": [str(i) for i in range(5000)], "label": "a"}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        read_rows(path, BOTH)


def test_missing_columns_are_named_with_what_there_is(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "tweet", "class"], [["1", "a", "b"]])
    with pytest.raises(UserError) as caught:
        read_rows(path, {"text": "tweets", "label": "Class"})
    assert str(caught.value) == (
        f"{path} has no column tweets (data.text_column), did you mean tweet? and "
        "Class (data.label_column), did you mean class?; its columns: id, tweet, class"
    )


def test_a_key_that_only_later_json_objects_have_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "c"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", BOTH)["label_kind"]) == ["missing", "text"]


def test_missing_files_are_named_all_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.csv")
    data = Data(train=str(tmp_path / "mime.csv"), test=str(tmp_path / "no" / "x.csv"))
    with pytest.raises(UserError) as caught:
        find_sources(data)
    assert str(caught.value).splitlines() == [
        f"data.train: {tmp_path / 'mime.csv'} does not exist, did you mean mine.csv?",
        f"data.test: {tmp_path / 'no' / 'x.csv'} does not exist",
    ]


def found(folder: Path, **data: object) -> dict[str, list[str]]:
    """Write no file and return what would be read, relative to the folder."""
    files, ignored = find_sources(Data(**{"train": str(folder)} | data))
    named = dict(files) | ({"ignored": ignored} if ignored else {})
    return {
        split: [path.relative_to(folder).as_posix() for path in paths]
        for split, paths in named.items()
    }


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_directory_gives_its_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "dev.jsonl.gz", "Test.parquet", "notes.csv", "README.md")
    assert found(tmp_path) == {
        "train": ["train.csv"],
        "validation": ["dev.jsonl.gz"],
        "test": ["Test.parquet"],
        "ignored": ["README.md", "notes.csv"],
    }


def test_folders_may_be_named_after_the_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.csv", "train/a.csv", "test/x.csv", "train/.hidden.csv")
    assert found(tmp_path) == {"train": ["train/a.csv", "train/b/1.csv"], "test": ["test/x.csv"]}


def test_the_layout_of_a_repository_of_the_hub(tmp_path: Path) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    names += ["test-00000-of-00001.parquet"]
    touch(tmp_path, "README.md", *(f"data/{name}" for name in names))
    assert found(tmp_path) == {
        "train": [f"data/{name}" for name in names[:2]],
        "test": [f"data/{names[2]}"],
        "ignored": ["README.md"],
    }
    (tmp_path / "data" / names[0]).unlink()
    with pytest.raises(UserError, match="data/train: of 2 files these are missing: 00000"):
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
def test_what_may_be_a_split_is_never_guessed(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=r"may be a split, and is not named.*data\.train_files"):
        found(tmp_path)


def test_linked_folders_are_read(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.csv")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data") == {"train": ["train/a.csv"]}


def test_a_name_that_is_not_utf_8_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.csv").touch()
    with pytest.raises(UserError, match="its name is not UTF-8; rename it"):
        found(tmp_path)


def test_a_directory_without_such_names_is_all_train(tmp_path: Path) -> None:
    touch(tmp_path, "2024/b.csv", "2024/a.csv.zst", "2025/c.csv", "2025/_SUCCESS")
    assert found(tmp_path) == {"train": ["2024/a.csv.zst", "2024/b.csv", "2025/c.csv"]}
    touch(tmp_path, "2025/d.xlsx", "2025/e.csv.lz4")
    assert found(tmp_path)["ignored"] == ["2025/d.xlsx", "2025/e.csv.lz4"]


def test_patterns_choose_files_of_a_directory(tmp_path: Path) -> None:
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
        ({"train_files": "*.parquet"}, "matches no readable file.*could be read: a.csv"),
        ({"train_files": "../*.csv"}, "leaves"),
        ({"train_files": "*.csv", "test_files": "*.csv"}, "needs a directory in data.test"),
        ({"test": "a.csv", "test_files": "a*"}, "needs a directory, and .*a.csv is a file"),
        ({"test": "a.csv"}, "a.csv is a file of data.train and of data.test"),
        ({"train": "*.csv"}, r"set data.train: .* and data.train_files: \*.csv"),
        ({"train": "hf://datasets/a/b"}, "hf://datasets/a/b is not a path; .*hub/params.yaml"),
    ],
)
def test_paths_and_patterns_that_cannot_be_meant(tmp_path: Path, data: dict, message: str) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    paths = {
        key: str(tmp_path / value)
        for key, value in data.items()
        if "files" not in key and "://" not in value
    }
    with pytest.raises(UserError, match=message):
        found(tmp_path, **data | paths)


def test_a_file_of_one_s_own_replaces_the_directory_s(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "test.csv", "own.csv")
    assert found(tmp_path, test=str(tmp_path / "own.csv")) == {
        "train": ["train.csv"],
        "test": ["own.csv"],
        "ignored": ["test.csv"],
    }


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    names = [f"train-0000{index}-of-00002.csv" for index in (1, 0)]
    touch(tmp_path, *names)
    assert found(tmp_path) == {"train": sorted(names)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tain.csv", "test.csv"], "no file or folder named train.*could be read: tain.csv"),
        (["train.csv", "train.jsonl"], "more than one train file: train.csv, train.jsonl"),
    ],
    ids=["none", "two"],
)
def test_a_directory_without_one_train_file(tmp_path: Path, names: list, message: str) -> None:
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
def test_content_key_ignores_whitespace_only(one: str, other: str, same: bool) -> None:
    assert (content_key(one) == content_key(other)) is same


def test_content_key_is_the_sha256_of_plain_text() -> None:
    assert content_key("plain text") == hashlib.sha256(b"plain text").digest()


def labelled(count: int, labels: int, seed: int = 0) -> pd.DataFrame:
    random.seed(seed)
    texts = [f"text {random.random()}" for _ in range(count)]
    return pd.DataFrame({"text": texts, "label": [f"label {i % labels}" for i in range(count)]})


def held_out(rows: pd.DataFrame, **shares: float) -> dict[str, pd.DataFrame]:
    keys = [content_key(text) for text in rows["text"]]
    high = np.array([int.from_bytes(key[:8]) for key in keys], np.uint64)
    cluster = pd.factorize(pd.Series(keys))[0]
    numbers = {SPLITS.index(name): share for name, share in shares.items()}
    split = hold_out(high, cluster, pd.factorize(rows["label"], sort=True)[0], numbers)
    return {name: rows[split == SPLITS.index(name)] for name in ("train", *shares)}


def test_hold_out_keeps_relatives_together_and_large_families_in_train() -> None:
    rows = labelled(100, 1)
    high = np.arange(100, dtype=np.uint64)
    cluster = np.concatenate([np.zeros(40), np.repeat(np.arange(1, 31), 2)]).astype(int)
    split = hold_out(high, cluster, None, {2: 0.1, 1: 0.2})
    assert Counter(split.tolist()) == {0: 70, 1: 20, 2: 10}
    assert all(len(set(split[cluster == number])) == 1 for number in range(31))
    assert set(split[:40]) == {0}
    assert len(rows) == len(split)


def test_hold_out_takes_exact_shares_of_each_label() -> None:
    splits = held_out(labelled(300, 3), test=0.2, validation=0.1)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 210,
        "test": 60,
        "validation": 30,
    }
    assert set(Counter(splits["test"]["label"]).values()) == {20}


def test_hold_out_takes_the_lowest_hashes() -> None:
    rows = labelled(50, 1)
    ranked = sorted(rows["text"], key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    splits = held_out(rows, test=0.2, validation=0.1)
    assert set(splits["test"]["text"]) == set(ranked[:10])
    assert set(splits["validation"]["text"]) == set(ranked[10:15])


def test_hold_out_does_not_depend_on_order() -> None:
    rows = labelled(100, 4)
    once = held_out(rows, test=0.15, validation=0.1)
    again = held_out(rows.sample(frac=1, random_state=3), test=0.15, validation=0.1)
    for name in once:
        assert set(once[name]["text"]) == set(again[name]["text"])


def test_hold_out_keeps_copies_together_whatever_their_labels() -> None:
    rows = labelled(40, 2)
    copies = rows.assign(text="  " + rows["text"] + "\n", label=rows["label"].iloc[::-1].values)
    splits = held_out(pd.concat([rows, copies], ignore_index=True), test=0.2, validation=0.2)
    keys = {name: set(part["text"].map(content_key)) for name, part in splits.items()}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["test"] & keys["validation"]
    assert sum(map(len, splits.values())) == 80


@pytest.mark.parametrize("count", range(1, 12))
def test_hold_out_of_few_rows_leaves_train_every_label(count: int) -> None:
    splits = held_out(labelled(2 * count, 2), test=0.49, validation=0.49)
    assert set(splits["train"]["label"]) == {"label 0", "label 1"}
    expected = 2 if count >= 3 else 0
    assert splits["test"]["label"].nunique() == expected
    assert splits["validation"]["label"].nunique() == expected


def test_a_new_validation_share_leaves_the_test_split_alone() -> None:
    rows = labelled(100, 2)
    tests = [held_out(rows, test=0.1, validation=share)["test"] for share in (0.1, 0.3)]
    pd.testing.assert_frame_equal(*tests)


def prepared(directory: Path) -> dict[str, pd.DataFrame]:
    rows = labelled(12, 2).assign(file="mine.csv", row=range(1, 13))
    splits = dict(zip(SPLITS, (rows[:8], rows[8:10], rows[10:]), strict=True))
    write_prepared(directory, "classification", splits, "{text}:")
    return splits


def test_a_prepared_dataset_is_read_as_it_was_written(tmp_path: Path) -> None:
    splits = prepared(tmp_path / "dataset")
    dataset = load_prepared(tmp_path / "dataset")
    assert dataset.task == "classification"
    assert dataset.labels == ("label 0", "label 1")
    assert dataset.rows == {"train": 8, "validation": 2, "test": 2}
    assert dataset.prompt_template == "{text}:"
    assert [dict(example) for example in dataset.examples("validation")] == [
        {"input_ids": [1, 2, 3], "prompt_length": 1, "length": 3}
    ] * 2
    with pytest.raises(ValueError, match="'test' is not one of"):
        dataset.examples("test")
    for name in SPLITS:
        rows = dataset.split(name)
        assert list(rows.columns) == ["text", "label", "file", "row"]
        assert rows.values.tolist() == splits[name][list(rows.columns)].values.tolist()
    with pytest.raises(ValueError, match="'dev' is not one of"):
        dataset.split("dev")


def test_prompts_are_made_as_it_says(tmp_path: Path, tiny_model_dir: Path) -> None:
    encoder = TextEncoder.load(tiny_model_dir)
    prepared(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "truncation_side": "left"}))
    prompts = load_prepared(tmp_path).prompt_encoder(encoder, 12)
    words = "the quick brown fox jumps over the lazy dog " * 3
    ids = prompts.prompt(words, 4).ids
    assert len(ids) == 8
    assert encoder.decode(ids).endswith("lazy dog:")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepared(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_prepared_dataset_that_is_absent_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_prepared(tmp_path)
    prepared(tmp_path / "dataset")
    (tmp_path / "dataset" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test\.parquet cannot be read"):
        load_prepared(tmp_path / "dataset").split("test")
    (tmp_path / "dataset" / "train.arrow").write_bytes(b"ARROW")
    with pytest.raises(UserError, match=r"train\.arrow cannot be read"):
        load_prepared(tmp_path / "dataset").examples("train")
    (tmp_path / "dataset" / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="was not written by validate"):
        load_prepared(tmp_path / "dataset")
