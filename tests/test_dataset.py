"""Reading files, holding out splits, and the prepared dataset on disk."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptj8.dataset import SPLITS, load_prepared, save_prepared
from gptj8.errors import UserError
from gptj8.formats import read_rows
from gptj8.params import Data
from gptj8.sources import content_key, hold_out, read_splits

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
    "latin-1": ("t.csv", b"text,label\na,b\ncaf\xe9,b\n", "line 3: byte 0xE9 is not UTF-8"),
    "too-many-cells": (
        "t.csv",
        b"text,label\na,b\n\na,b,c\n",
        "line 4 has 3 cells, the header has 2",
    ),
    "too-few-cells": (
        "t.csv",
        b'text,label\n"a\nb",c\na\n',
        "line 4 has 1 cells, the header has 2",
    ),
    "open-quote": ("t.csv", b'text,label\na,b\n"c,d\ne,f\n', "line 3: a quote is opened and never"),
    "stray-quote": ("t.csv", b'text,label\n"a" b,c\n', "line 2: text follows a closing quote"),
    "repeated-column": ("t.csv", b"text,label,text\na,b,c\n", "more than one column text"),
    "semicolons": ("t.csv", b"text;label\na;b\n", "separated by commas?"),
    "truncated-json": ("t.jsonl", b'{"text": "a", "label": "b"}\n{"text"', "line 2 column 8"),
    "json-array": ("t.json", b'[{"text": "a"},\n {"text" 1}]', "line 2 column 10"),
    "json-list-line": ("t.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
    "pretty-json": ("t.jsonl", b'{\n"text": "a"\n}\n', "has an object on each line"),
    "huge-integer": ("t.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "line 1 is not usable JSON"),
    "deep-json": ("t.jsonl", b'{"text": ' + b"[" * 99999 + b"\n", "line 1 is not usable JSON"),
    "not-parquet": ("t.parquet", b"PAR1 is not enough", "is not a Parquet file"),
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
        read_splits(data)
    assert str(caught.value).splitlines() == [
        f"data.train: {tmp_path / 'mime.csv'} does not exist, did you mean mine.csv?",
        f"data.test: {tmp_path / 'no' / 'x.csv'} does not exist",
    ]


def test_a_directory_gives_its_splits(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.jsonl", "test.parquet", "notes.csv"):
        write_rows(tmp_path / name)
    splits = read_splits(Data(train=str(tmp_path)))
    files = {name: {Path(file).name for file in rows["file"]} for name, rows in splits.items()}
    assert files == {"train": {"train.csv"}, "validation": {"dev.jsonl"}, "test": {"test.parquet"}}


def test_a_file_of_one_s_own_replaces_the_directory_s(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv")
    write_rows(tmp_path / "test.csv")
    own = write_rows(tmp_path / "own.csv")
    splits = read_splits(Data(train=str(tmp_path), test=str(own)))
    assert list(splits) == ["train", "test"]
    assert set(splits["test"]["file"]) == {own.as_posix()}


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    for index in (1, 0):
        write_csv(tmp_path / f"train-0000{index}-of-00002.csv", ["text", "label"], [[index, "a"]])
    rows = read_splits(Data(train=str(tmp_path)))["train"]
    assert list(rows["text"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tain.csv"], "no file train.*could be read: tain.csv"),
        (["train.csv", "train.jsonl"], "more than one train file: train.csv, train.jsonl"),
    ],
    ids=["none", "two"],
)
def test_a_directory_without_one_train_file(tmp_path: Path, names: list, message: str) -> None:
    for name in names:
        write_rows(tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_splits(Data(train=str(tmp_path)))


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
    assert len(content_key(one)) == 64


def test_content_key_is_the_sha256_of_plain_text() -> None:
    assert content_key("plain text") == hashlib.sha256(b"plain text").hexdigest()


def labelled(count: int, labels: int, seed: int = 0) -> pd.DataFrame:
    random.seed(seed)
    texts = [f"text {random.random()}" for _ in range(count)]
    return pd.DataFrame({"text": texts, "label": [f"label {i % labels}" for i in range(count)]})


def held_out(rows: pd.DataFrame, **shares: float) -> dict[str, pd.DataFrame]:
    return hold_out(rows, shares, rows["text"].map(content_key), rows["label"])


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
    rows = labelled(12, 2).assign(file="mine.csv", row=range(1, 13), tokens=5)
    splits = dict(zip(SPLITS, (rows[:8], rows[8:10], rows[10:]), strict=True))
    rejected = pd.DataFrame(columns=["file", "row", "reason"])
    save_prepared(directory, "classification", splits, rejected)
    return splits


def test_a_prepared_dataset_is_read_as_it_was_written(tmp_path: Path) -> None:
    splits = prepared(tmp_path / "dataset")
    dataset = load_prepared(tmp_path / "dataset")
    assert dataset.task == "classification"
    assert dataset.labels == ("label 0", "label 1")
    assert dataset.rows == {"train": 8, "validation": 2, "test": 2}
    for name in SPLITS:
        rows = dataset.split(name)
        assert list(rows.columns) == ["text", "label", "file", "row"]
        assert rows.values.tolist() == splits[name][list(rows.columns)].values.tolist()
    with pytest.raises(ValueError, match="'dev' is not one of"):
        dataset.split("dev")


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
    (tmp_path / "dataset" / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="was not written by validate"):
        load_prepared(tmp_path / "dataset")
