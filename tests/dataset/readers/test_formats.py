"""Tests of reading rows: every format, compressed files and damaged files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.readers.formats import read_batches, read_rows
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.text_files import encoding_of
from gptj8.runtime.errors import UserError
from tests.helpers.row_files import ROWS, write_csv, write_rows

BOTH = ReadOptions({"text": "text", "label": "label"})
TEXT = ReadOptions({"text": "text"})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"data.{suffix}")
    rows = read_rows(path, BOTH)
    assert list(zip(rows["text"], rows["label"], strict=True)) == ROWS
    assert set(rows["text_kind"]) == set(rows["label_kind"]) == {"text"}
    assert list(rows["row"]) == [1, 2, 3]
    assert set(rows["file"]) == {path.as_posix()}


def test_custom_column_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "class", "tweet"], [["7", "very good", "hello"]])
    rows = read_rows(path, ReadOptions({"text": "tweet", "label": "class"}))
    assert rows[["text", "label"]].values.tolist() == [["hello", "very good"]]


def test_one_column_can_serve_two_fields(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["a"], [["x"]])
    rows = read_rows(path, ReadOptions({"prompt": "a", "completion": "a"}))
    assert rows[["prompt", "completion"]].values.tolist() == [["x", "x"]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_byte_order_mark_is_removed(tmp_path: Path, suffix: str) -> None:
    content = {".csv": "text\nhello\n", ".jsonl": '{"text": "hello"}\n', ".txt": "hello\n"}[suffix]
    path = tmp_path / f"bom{suffix}"
    path.write_text(content, encoding="utf-8-sig")
    assert list(read_rows(path, TEXT)["text"]) == ["hello"]


def test_csv_cells_are_read_unchanged(tmp_path: Path) -> None:
    cells = ["007", "NA", "null", "1e5", "=1+1", " padded ", ""]
    path = write_csv(tmp_path / "t.csv", ["text", "label"], [["x", cell] for cell in cells])
    assert list(read_rows(path, BOTH)["label"]) == cells


def test_blank_lines_are_skipped_and_rows_keep_their_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n\na,b\n\n   \nc,d\n")
    assert list(read_rows(tmp_path / "t.csv", BOTH)["row"]) == [1, 2]
    (tmp_path / "t.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", TEXT)["row"]) == [2, 4]
    (tmp_path / "t.txt").write_text("a\n\n \nb")
    rows = read_rows(tmp_path / "t.txt", ReadOptions({"text": "content"}))
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
    rows = read_rows(path, ReadOptions({"text": "a"}))
    value = rows["text"][1]
    assert (value == text) if text is not None else pd.isna(value)
    assert list(rows["text_kind"]) == ["text", kind, "missing"]


def test_unpaired_surrogate_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", TEXT)["text"]) == ["a\ufffd", "🙂"]


def test_parquet_class_labels_are_read_as_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    content = {"text": ["a", "b"], "label": [1, 0]}
    Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "t.parquet"))
    assert list(read_rows(tmp_path / "t.parquet", BOTH)["label"]) == ["good", "bad"]


def test_parquet_column_types(tmp_path: Path) -> None:
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
    "latin-1-header": (
        "t.csv",
        b"text,caf\xe9\n\xc3\xbc,b\n",
        "line 1: the column names are not UTF-8",
    ),
    "repeated-column": ("t.csv", b"text,label,text\na,b,c\n", "repeated column names: text"),
    "other-delimiter": ("t.csv", b"text%label\na%b\n", "not separated by commas"),
    "json-array": ("t.json", b'[{"text": "a"},\n {"text" 1}]', "line 2 column 10"),
    "pretty-json": (
        "t.jsonl",
        b'{\n"text": "a"\n}\n{\n"text": "b"\n}\n',
        "use JSON Lines with one object per line",
    ),
    "not-parquet": ("t.parquet", b"PAR1 is not enough", "is not a Parquet file"),
    "not-gzip": ("t.csv.gz", b"text,label\na,b\n", "cannot be decompressed"),
    "truncated-gzip": ("t.csv.gz", gzip.compress(b"text,label\na,b\n")[:-9], "decompressed"),
    "truncated-xz": ("t.csv.xz", lzma.compress(b"text,label\na,b\n")[:-9], "decompressed"),
    "packed-parquet": ("t.parquet.gz", gzip.compress(b"PAR1"), "unpack .gz first"),
    "no-columns": ("t.txt", b"hello\n", "has no column text"),
    "spreadsheet": ("t.xlsx", b"PK", "the suffix .xlsx is not supported; use one of .csv"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_raise_with_file_and_line(
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
        ("t.tsv", 'text\tlabel\n"a\tx\nb\tx\nit the "\tx\nd\tx\n', {}),  # quotes are text
        ("t.csv", 'text,label\nz,x\n"a,x\nb,x\nc,x\nit ",x\n', {2: "4 rows .* line 3"}),
        ("t.csv", 'id,text,label\n1,"a,x\n2,b,x\n3,it ",x\n', {1: "3 rows .* line 2"}),
        ("t.csv", 'text,label\n"Hello, world\nbye",x\n"one, two\nbuckle, my\nshoe",y\n', {}),
        ("t.csv", 'text,label\n"a\n\nb",x\n"""quoted"", he\nsaid",y\n', {}),
    ],
)
def test_rows_joined_by_a_stray_quote_get_a_warning(
    tmp_path: Path, name: str, content: str, warnings: dict[int, str]
) -> None:
    (tmp_path / name).write_text(content)
    rows = read_rows(tmp_path / name, BOTH)
    found = rows[rows["warning"].notna()].set_index("row")["warning"].to_dict()
    assert found.keys() == warnings.keys()
    assert all(re.search(pattern, found[row]) for row, pattern in warnings.items())


MALFORMED = {
    "too-many-cells": ("t.csv", b"text,label\na,b\n\na,b,c\nd,e\n", "has 3 cells on line 4"),
    "too-few-cells": ("t.csv", b'text,label\n"a\nb",c\na\nd,e\n', "has 1 cell on line 4"),
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
def test_malformed_row_has_a_problem(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    columns = BOTH if b"text" in content else ReadOptions({"label": "label"})
    rows = read_rows(tmp_path / name, columns)
    assert list(rows["row"]) == [1, 2, 3]
    assert list(rows["problem"].isna()) == [True, False, True]
    assert problem in rows["problem"][1]
    assert rows["label_kind"][1] == "missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"text,label\n\xc3\xa0,b\ncaf\xe9,b\nc,d\n"),
        ("t.jsonl", b'{"text": "\xc3\xa0"}\n{"text": "caf\xe9"}\n{"text": "c", "label": "d"}\n'),
        ("t.txt", b"\xc3\xa0\ncaf\xe9\nc\n"),
    ],
)
def test_bytes_that_are_not_utf_8_affect_only_their_cell(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = read_rows(tmp_path / name, TEXT)
    assert list(rows["text_kind"]) == ["text", "undecodable", "text"]
    assert list(rows["text"]) == ["à", "caf\ufffd", "c"]


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("filler", [0, 3_000_000], ids=["small", "several-chunks"])
@pytest.mark.parametrize(
    ("encoding", "text", "found"),
    [
        ("latin-1", "café,naïve", "cp1252"),
        ("cp1252", "“quoted”,€ 5", "cp1252"),
        ("utf-8", "café,“quoted”", "utf-8-sig"),
        ("utf-8-sig", "café,x", "utf-8-sig"),
        ("ascii", "plain,x", "utf-8-sig"),
    ],
)
def test_the_encoding_of_a_file_as_a_whole(tmp_path, encoding, text, found, filler, compression):
    lines = f"text,label\n{'a' * filler},b\n{text}\n".encode(encoding)
    path = tmp_path / f"t.csv{compression}"
    path.write_bytes(gzip.compress(lines) if compression else lines)
    assert encoding_of(path) == found
    rows = read_rows(path, TEXT)
    assert rows["text"][1] == text.split(",")[0]
    assert (rows["text_kind"] == "text").all()


@pytest.mark.parametrize("content", [b"a\x81b", b"\xc3\xa0 caf\xe9", b"caf\xe9 \xe2\x82\xac"])
def test_bytes_of_two_encodings_or_of_none_are_not_guessed(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    assert encoding_of(tmp_path / "t.txt") == "utf-8-sig"


def test_a_last_byte_that_begins_a_character(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    assert encoding_of(tmp_path / "t.txt") == "cp1252"


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
def test_compressed_file_gives_the_same_rows(
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


def test_plain_text_file_can_be_one_row(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"one\r\n\ntwo\n")
    rows = read_rows(tmp_path / "t.txt", replace(TEXT, text_row="file"))
    assert rows[["row", "text"]].values.tolist() == [[1, "one\n\ntwo\n"]]


def test_batches_cover_all_rows_and_report_all_bytes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["text"], [[f"row {i}"] for i in range(10_000)])
    done: list[int] = []
    batches = list(read_batches([path], TEXT, advance=done.append))
    assert [len(batch) for batch in batches] == [4096, 4096, 1808]
    assert sum(done) == path.stat().st_size and len(done) == 3
    assert [text for b in batches for text in b["text"]] == [f"row {i}" for i in range(10_000)]


def test_damaged_parquet_pages_raise(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": [str(i) for i in range(5000)], "label": "a"}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        read_rows(path, BOTH)


def test_missing_columns_are_reported_with_existing_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "tweet", "class"], [["1", "a", "b"]])
    with pytest.raises(UserError) as caught:
        read_rows(path, ReadOptions({"text": "tweets", "label": "Class"}))
    assert str(caught.value) == (
        f"{path} has no column tweets (data.text_column), did you mean tweet? and "
        "Class (data.label_column), did you mean class?; its columns: id, tweet, class"
    )


def test_key_of_later_json_objects_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "c"}\n')
    assert list(read_rows(tmp_path / "t.jsonl", BOTH)["label_kind"]) == ["missing", "text"]
