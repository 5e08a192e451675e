"""Tests with about 1,100 damaged files; each must give a consistent report or one clear error.

- Seeded random damage to CSV, TSV, JSON Lines, JSON arrays and plain text, compressed or not, and
  to Parquet. Every row is in a split or in a finding with place and reason; an error names the
  file; nothing else is raised, and each file finishes in time.
- JSON Lines are compared with a loop over `json.loads`, and CSV with any legal quoting is compared
  with the rows that were written: no row is lost, changed or renumbered.
- The line and column of quoting errors are checked at places known by construction.
- Large and hostile content: cells of 10 MB, deep nesting, very long headers, Parquet metadata.
- The worst files also run through the validate stage.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import Validated, validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.file_damage import DAMAGES, LINE_ENDS, compressed, good_file, random_rows
from tests.helpers.labelled_rows import byte_tokenizer
from tests.helpers.time_limit import time_limit
from tests.helpers.validate_project import run_stage, write_params

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SEEDS = 2
SECONDS = 5
"""Time limit for a small file, which usually takes 0.03 s."""
LONGEST_LINE = 3_000
LARGE = 10_000_000


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(), eos_id=0)


# --- invariants ----------------------------------------------------------------------------------


def examine(
    path: Path, data: bytes, encoder: TextEncoder, seconds: float = SECONDS, **params: object
) -> tuple[Validated | None, pd.DataFrame | None, str]:
    """Validate a file and assert the invariants that hold for every file.

    Returns:
        The result, the prepared rows (None if there are problems), and the error message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    out = path.with_name(f"{path.name} prepared")
    out.mkdir()
    task = "text" if ".txt" in path.suffixes else "classification"
    params = {"text_row": "line", **params}
    try:
        with time_limit(seconds):
            validated = validate(Data(train=str(path), task=task, **params), encoder, out)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(str(path) in line and is_clear(line) for line in lines)
        return None, None, str(error)
    assert all(is_clear(problem) for problem in validated.problems)
    found = validated.findings.frame()
    assert (found["file"] == path.as_posix()).all() and (found["reason"].str.len() > 0).all()
    assert found["row"].between(1, max(rows_at_most(data, path), 1)).all()
    dropped = set(found.loc[found["dropped"], "row"])
    assert validated.total_rows.total() == sum(validated.rows.values()) + len(dropped)
    assert 0 <= validated.invalid_rows.total() <= len(dropped)
    if validated.problems:
        return validated, None, ""
    prepared = load_prepared(out)
    kept = pd.concat([prepared.split(name) for name in SPLITS])
    assert dict(prepared.rows) == validated.rows and len(kept) == sum(validated.rows.values())
    assert kept["row"].is_unique and not dropped & set(kept["row"])
    for name, examples in validated.examples.items():
        with pa.OSFile(str(out / f"{name}.arrow")) as file:
            assert pa.ipc.open_stream(file).read_all().num_rows == examples
    return validated, kept, ""


def is_clear(line: str) -> bool:
    return 0 < len(line) <= LONGEST_LINE and line.isprintable()


def rows_at_most(data: bytes, path: Path) -> int:
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix in COMPRESSIONS:
        data = pa.input_stream(path).read()
    lines = data.count(b"\n") + data.count(b"\r") + 1
    return lines + data.count(b"{") if ".json" in path.suffixes else lines


def objects_of(data: bytes) -> dict[int, dict | None]:
    """Return the object that `json.loads` reads from each line that is not blank.

    The value is None if the line is not an object or if a key is repeated.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    objects: dict[int, dict | None] = {}
    text = data.decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=unique)
            except (ValueError, RecursionError):
                value = None
            objects[number] = value if isinstance(value, dict) else None
    return objects


def is_usable(row: dict | None) -> bool:
    """Return whether the row must pass every check of single rows."""
    cells = [row.get("text"), row.get("label")] if row else [None]
    return all(
        isinstance(cell, str)
        and re.search(r"[^\s\u200b-\u200d\u2060\ufeff]", cell)
        and not re.search("[\0\ufffd\ud800-\udfff]", cell)
        for cell in cells
    ) and len(cells[-1]) < 100  # fmt: skip


def compare_with_json(
    data: bytes, validated: Validated | None, kept: pd.DataFrame | None, error: str
) -> None:
    objects = objects_of(data)
    usable = {number for number, row in objects.items() if is_usable(row)}
    if validated is None:
        first = data.decode("utf-8-sig", "surrogateescape").strip()[:1]
        assert not usable or first == "[" or "UTF-16" in error or " is not valid JSON; " in error
        return
    found = validated.findings.frame()
    assert validated.total_rows.total() == len(objects)
    malformed = set(found.loc[found["check"] == "malformed", "row"])
    assert malformed == {number for number, row in objects.items() if row is None}
    assert not usable & set(found.loc[found["dropped"] & (found["check"] != "duplicate"), "row"])
    if kept is not None:
        texts = kept.set_index("row")["text"].to_dict()
        assert usable <= set(texts) | set(found.loc[found["check"] == "duplicate", "row"])
        assert all(objects[row]["text"] == texts[row] for row in usable & set(texts))


# --- random damage -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_gives_a_report_or_an_error(
    tmp_path: Path, encoder: TextEncoder, name: str, suffix: str
) -> None:
    for seed in range(SEEDS if suffix in (".csv", ".jsonl") else 1):
        rng = random.Random(f"{name} {suffix} {seed}")
        data = DAMAGES[name](good_file(suffix, rng, random_rows(rng)), rng)
        if seed:  # damage it again, possibly in the same place
            data = DAMAGES[rng.choice(["bits flipped", "truncated"])](data, rng) if data else data
        share = rng.choice([0.05, 1.0])
        path = tmp_path / f"{seed}{suffix}"
        outcome = examine(path, data, encoder, max_invalid_fraction=share)
        if suffix == ".jsonl":
            compare_with_json(data, *outcome)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_damaged_compressed_files(
    tmp_path: Path, encoder: TextEncoder, suffix: str, compression: str
) -> None:
    rng = random.Random(suffix + compression)
    good = compressed(good_file(suffix, rng, random_rows(rng)), compression)
    for number in range(12):
        name = ("truncated", "bits flipped", "beginning lost", "noise", "twice")[number % 5]
        path = tmp_path / f"{number}{suffix}{compression}"
        validated, _, error = examine(path, DAMAGES[name](good, rng), encoder)
        if name in ("truncated", "noise"):
            assert validated is None and ("decompressed" in error or "is empty" in error)


@pytest.mark.parametrize("number", range(30))
def test_damaged_parquet_files(tmp_path: Path, encoder: TextEncoder, number: int) -> None:
    rng = random.Random(number)
    data = good_file(".parquet", rng, random_rows(rng))
    name = ("bits flipped", "truncated", "bytes", "noise")[number % 4]
    examine(tmp_path / "a.parquet", DAMAGES[name](data, rng), encoder)


@pytest.mark.parametrize("content", [".csv", ".jsonl", ".parquet"])
def test_content_that_does_not_match_the_suffix(
    tmp_path: Path, encoder: TextEncoder, content: str
) -> None:
    rng = random.Random(content)
    good = good_file(content, rng, random_rows(rng))
    for suffix in (*FORMATS, ".parquet"):
        for packing in COMPRESSIONS:
            examine(tmp_path / packing / f"a{suffix}", compressed(good, packing), encoder)
            examine(tmp_path / f"not {packing}" / f"a{suffix}{packing}", good, encoder)
        examine(tmp_path / f"a{suffix}", good, encoder)


# --- exact results -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*FORMATS, ".parquet"])
def test_good_file_is_read_unchanged(tmp_path: Path, encoder: TextEncoder, suffix: str) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        rows = random_rows(rng, lines=suffix != ".txt")
        packing = rng.choice(["", *COMPRESSIONS]) if suffix != ".parquet" else ""
        data = good_file(suffix, rng, rows)
        path = tmp_path / f"{seed}{suffix}{packing}"
        _, kept, _ = examine(path, compressed(data, packing) if packing else data, encoder)
        assert kept is not None
        expected = [{**row, "row": number} for number, row in enumerate(rows, 1)]
        fields = ["text", "row"] if suffix == ".txt" else ["text", "label", "row"]
        expected = pd.DataFrame(expected)[fields].values.tolist()
        assert kept.sort_values("row")[fields].values.tolist() == expected


AFTER, NEVER = "text follows a closing quote", "a quote is opened and never closed"
QUOTES = {
    "after a closing quote": ('text,label\na b,ham\n"c d" x,ham\n', 3, 6, AFTER),
    "inside a quoted cell": ('text,label\n"say "hi" now",ham\n', 2, 7, AFTER),
    "never closed": ('text,label\na,ham\nb,"ham\nc,spam\n', 3, 3, NEVER),
    "opened at the end": ('text,label\na,"', 2, 3, NEVER),
    "in the header": ('"text"x,label\na,ham\n', 1, 7, AFTER),
    "never closed in the header": ('text,"label\na,ham', 1, 6, NEVER),
    "cells of several lines": ('text,label\n"a\nb\n\nc",ham\n"d\ne" f,spam\n', 7, 3, AFTER),
    "doubled quotes": ('text,label\n"a ""b"" c"",ham\nd,spam\n', 2, 1, NEVER),
    "blank lines": ('\n\ntext,label\n\n\na,"b" c\n', 6, 6, AFTER),
    "wide characters": ('text,label\n"😀é語"ё,ham\n', 2, 6, AFTER),
    "closed by the next opening": ('text,label\n"a,ham\nb,"ham"\nc,spam\n', 3, 4, AFTER),
    "far down": ("text,label\n" + '"a ""b""",ham\n' * 3000 + 'c,"d" ', 3002, 6, AFTER),
}


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
@pytest.mark.parametrize("name", QUOTES)
def test_quoting_errors_are_located(
    tmp_path: Path, encoder: TextEncoder, name: str, end: str
) -> None:
    content, line, column, reason = QUOTES[name]
    for packing in ("", *COMPRESSIONS):
        for suffix, delimiter, mark in ((".csv", ",", "utf-8"), (".tsv", "\t", "utf-8-sig")):
            data = content.replace("\n", end).replace(",", delimiter).encode(mark)
            path = tmp_path / f"a{suffix}{packing}"
            data = compressed(data, packing) if packing else data
            _, _, error = examine(path, data, encoder, quoting="minimal")
            assert error.startswith(f"{path} line {line} column {column}: {reason}")


@pytest.mark.parametrize("before", ["", "\n\n", " \r\n"], ids=ascii)
def test_json_errors_are_located(tmp_path: Path, encoder: TextEncoder, before: str) -> None:
    good = '{"text": "a", "label": "b"}'
    line = 3 + before.count("\n")
    data = f'{before}[\r\n{good},\r\n{{"text": }}]'.encode()
    _, _, error = examine(tmp_path / "a.json", data, encoder)
    assert error.startswith(f"{tmp_path}/a.json line {line} column 10 is not valid JSON")
    data = f'{before}{good}\n{good}\n{{"text": }}\n'.encode()
    validated, _, _ = examine(tmp_path / "a.jsonl", data, encoder)
    assert validated is not None
    found = validated.findings.frame().query("check == 'malformed'")
    assert found["row"].tolist() == [line]
    assert found["reason"].iloc[0].endswith("at column 10")


# --- large and hostile content -------------------------------------------------------------------


def with_cells(*cells: str, suffix: str = ".jsonl") -> bytes:
    """Return a good file followed by one row per cell in `cells`, with the cell as its text."""
    rows = random_rows(random.Random(0)) + [{"text": cell, "label": "ham"} for cell in cells]
    return good_file(suffix, random.Random(0), rows)


def with_json(*values: str) -> bytes:
    """Return good JSON Lines followed by one row per JSON value, with the value as its text."""
    return with_cells() + "".join(f'{{"text": {v}, "label": "ham"}}\n' for v in values).encode()


def parquet(metadata: str = "{}", **columns: object) -> bytes:
    names = [name.rstrip("_") for name in columns]  # `text_` is a second `text`
    known = {b"huggingface": metadata.encode("utf-8", "surrogateescape")}
    arrays = [pa.array(values) for values in columns.values()]
    pq.write_table(pa.Table.from_arrays(arrays, names, metadata=known), sink := io.BytesIO())
    return sink.getvalue()


csv_with = functools.partial(with_cells, suffix=".csv")
TEXTS = [row["text"] for row in random_rows(random.Random(1))]
ROWS = {"text": TEXTS, "label": ["ham", "spam"] * 12}
DATE, TIME = pa.array([9**9], pa.int32()).cast(pa.date32()), pa.array([10**14], pa.timestamp("s"))
MANY = ",".join(map(str, range(30_000))).encode()
FLOATS = ("NaN", "-Infinity", "1e400", "-0.0", "1e308", "0.1", "7" * 4300, "7" * 4301)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "digits of an entity.jsonl": lambda: with_cells("&#" + "1" * 5000 + ";"),
    "combining marks.jsonl": lambda: with_cells("a" + "\u0301\u0316" * 50_000),
    "depth of lists.jsonl": lambda: with_json(*("[" * n + "]" * n for n in range(1, 1100))),
    "depth of keys.jsonl": lambda: with_json(*('{"":' * n + "1" + "}" * n for n in range(1, 1100))),
    "numbers.jsonl": lambda: with_json(*FLOATS),
    "spaces.jsonl": lambda: with_cells("\x1c", "\x1f\x85", "\u3000", "\u200b", "\u2028", "\ufeff"),
    "many spaces.csv": lambda: csv_with(" " * 70_000 + "a", "\t" * 9999),
    "many columns.csv": lambda: b"text,label,%s\na,b,%s\n" % (MANY, MANY),
    "many columns of others.csv": lambda: b"%s\n%s\n" % (MANY, MANY),
    "many columns without names.csv": lambda: b"," * 30_000,
    "long column.csv": lambda: b"x" * LARGE + b"\n1\n",
    "long column twice.csv": lambda: b"%s,%s\n1,2\n" % (b"x" * 99_999, b"x" * 99_999),
    "long key.jsonl": lambda: b'{"%s": 1}\n' % (b"x" * LARGE),
    "no rows.parquet": lambda: parquet(text=pa.array([], "str"), label=[]),
    "column twice.parquet": lambda: parquet(text_=TEXTS, **ROWS),
    "late date.parquet": lambda: parquet(text=DATE, label=["a"]),
    "late time.parquet": lambda: parquet(text=TIME, label=["a"]),
    "bytes.parquet": lambda: parquet(text=[b"\xff"] * 24, label=TEXTS),
    "column not UTF-8.parquet": lambda: parquet(**ROWS).replace(b"label", b"la\xffel"),
    "control characters.parquet": lambda: parquet(**{"text": TEXTS, "la\x1bbel\n": TEXTS}),
    "features cut.parquet": lambda: parquet('{"info": {"features": {"te', **ROWS),
    "features not UTF-8.parquet": lambda: parquet("\udcff", **ROWS),
    "features new.parquet": lambda: parquet(FEATURES % '{"text": {"_type": "New"}}', **ROWS),
    "features wrong.parquet": lambda: parquet(FEATURES % "5", **ROWS),
}
FEATURES = '{"info": {"features": %s}}'
TEN_MEGABYTES: dict[str, Callable[[], bytes]] = {
    "cell of words.csv": lambda: csv_with("some words " * (LARGE // 11)),
    "cell of one word.jsonl.gz": lambda: gzip.compress(with_cells("é" * (LARGE // 2))),
    "cell of quotes.csv": lambda: csv_with('"' * LARGE),
    "label.csv": lambda: csv_with() + b"\na," + b"x" * LARGE,
    "quote never closed.tsv": lambda: with_cells(suffix=".tsv") + b'\n"' + b"a b " * (LARGE // 4),
    "line of separators.csv": lambda: csv_with() + b"\n" + b"," * LARGE,
    "line of brackets.json": lambda: b"[" * LARGE,
    "noise.jsonl": lambda: random.Random(0).randbytes(LARGE),
    "NULs.csv.gz": lambda: gzip.compress(csv_with() + b"\0" * LARGE),
}
IN_THE_STAGE: dict[str, Callable[[], bytes]] = {
    "large.csv": TEN_MEGABYTES["cell of words.csv"],
    "brackets.json": TEN_MEGABYTES["line of brackets.json"],
    "unclosed.csv": lambda: csv_with() + b'\n"a\x1b[31m\xff,ham\n',
    "surrogates.jsonl": lambda: with_json(r'"\ud83d a"', r'"\udcff"', r'"a\u0000\u001b[31m"'),
    "markup.csv": lambda: csv_with("<script>alert(1)</script>", "&lt;b&gt; {{x}} $x"),
    "wide.csv": lambda: csv_with().decode().encode("utf-16"),
    "noise.jsonl": lambda: random.Random(1).randbytes(9999),
    "truncated.csv.gz": lambda: gzip.compress(csv_with())[:-20],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content(tmp_path: Path, encoder: TextEncoder, name: str) -> None:
    data = HOSTILE[name]()
    outcome = examine(tmp_path / name, data, encoder, max_invalid_fraction=1.0)
    if name.endswith(".jsonl") and "depth" not in name:  # the depth limit depends on the stack
        compare_with_json(data, *outcome)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN_MEGABYTES)
def test_ten_megabyte_content(tmp_path: Path, encoder: TextEncoder, name: str) -> None:
    data = TEN_MEGABYTES[name]()
    examine(tmp_path / name, data, encoder, seconds=20, max_invalid_fraction=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THE_STAGE)
def test_stage_never_prints_a_traceback(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    byte_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "config.json").write_text('{"vocab_size": 257, "eos_token_id": 0}')
    (folder / name).write_bytes(IN_THE_STAGE[name]())
    write_params(folder, train=name, max_invalid_fraction=0.5)
    done = run_stage(folder)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert any(name in line for line in errors) and all(map(is_clear, errors))
