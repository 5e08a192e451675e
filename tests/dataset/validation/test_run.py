"""Tests of checks, policies and reports."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
import string
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, PreparedDataset, load_prepared
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.sources import content_key
from gptj8.dataset.validation.report import metrics, token_lengths, write_report
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.labelled_rows import byte_tokenizer, pairs, sentences, write_csv


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(), eos_id=0)


class Checked:
    """The result of validating a dataset, read back from disk."""

    def __init__(self, data: Data, encoder: TextEncoder) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=Path(data.train).absolute().parent))
        self.validated = validate(data, encoder, self.directory)
        self.problems = self.validated.problems
        self.findings = self.validated.findings.frame()
        self.rejected = pq.read_table(self.directory / "rejected.parquet").to_pandas()
        self.metrics = metrics(self.validated)

    @property
    def prepared(self) -> PreparedDataset:
        assert not self.problems
        return load_prepared(self.directory)

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        return {name: self.prepared.split(name) for name in SPLITS}

    def found(self, check: str) -> list[tuple]:
        rows = self.findings[self.findings["check"] == check]
        return list(zip(rows["split"], rows["row"], rows["dropped"], strict=True))


def error_of(data: Data, encoder: TextEncoder) -> str:
    try:
        return "\n".join(Checked(data, encoder).problems)
    except UserError as error:
        return str(error)


def test_clean_dataset_has_no_findings(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = pairs(60, ("very good", "not so good", "neither"))
    validated = Checked(Data(train=write_csv(tmp_path / "t.csv", rows)), encoder)
    assert validated.findings.empty
    assert {name: len(split) for name, split in validated.splits.items()} == {
        "train": 48,
        "validation": 6,
        "test": 6,
    }
    kept = pd.concat(validated.splits.values())
    assert sorted(kept[["text", "label"]].values.tolist()) == sorted(rows)
    assert set(kept["row"]) == set(range(1, 61))


def test_every_failure_is_reported_at_its_row(tmp_path: Path, encoder: TextEncoder) -> None:
    bad = {
        5: ({"text": "", "label": "ham"}, ("text", "empty")),
        9: ({"text": " \t\n", "label": "ham"}, ("text", "empty")),
        11: ({"text": None, "label": "ham"}, ("text", "missing")),
        12: ({"label": "ham"}, ("text", "missing")),
        13: ({"text": 5, "label": "ham"}, ("text", "type")),
        20: ({"text": ["a"], "label": "ham"}, ("text", "type")),
        21: ({"text": "a\0b", "label": "ham"}, ("text", "nul")),
        22: ({"text": "caf\ufffd", "label": "ham"}, ("text", "replacement")),
        30: ({"text": "a", "label": None}, ("label", "missing")),
        31: ({"text": "b", "label": "  "}, ("label", "empty")),
        32: ({"text": "c", "label": [1.5, 2]}, ("label", "type")),
        33: ({"text": "d", "label": {"is": "ham"}}, ("label", "type")),
    }
    rows = [{"text": text, "label": label} for text, label in pairs(60)]
    for row, (content, _) in bad.items():
        rows[row - 1] = content
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validated = Checked(Data(train=str(path), max_invalid_fraction=0.5), encoder)
    findings = validated.findings
    assert {
        row: (column, check)
        for row, column, check in zip(
            findings["row"], findings["column"], findings["check"], strict=True
        )
    } == {row: expected for row, (_, expected) in bad.items()}
    assert findings["dropped"].all()
    assert len(validated.rejected) == len(bad)
    assert not set(pd.concat(validated.splits.values())["row"]) & set(bad)


def test_row_with_two_failures_counts_once(tmp_path: Path, encoder: TextEncoder) -> None:
    train = write_csv(tmp_path / "t.csv", [*pairs(40), ["", ""]])
    validated = Checked(Data(train=train), encoder)
    assert len(validated.rejected) == 2
    assert validated.metrics["rejected_rows"] == 1
    assert validated.metrics["rows"] == 41


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"on_invalid": "error", "max_invalid_fraction": 1.0}, "data.on_invalid = error"),
        ({"max_invalid_fraction": 0.04}, "data.max_invalid_fraction = 0.04"),
        ({"max_invalid_fraction": 0.05}, None),
    ],
    ids=["error", "too-many", "drop"],
)
def test_policy_for_invalid_rows(
    tmp_path: Path, encoder: TextEncoder, policy: dict, message: str | None
) -> None:
    train = write_csv(tmp_path / "t.csv", [*pairs(38), ["", "ham"], ["x", ""]])
    data = Data(train=train, **policy)
    if message is None:
        assert Checked(data, encoder).metrics["rejected_rows"] == 2
        return
    error = error_of(data, encoder)
    assert message in error
    assert "2 of 40" in error
    assert "t.csv row 39: text is empty" in error
    assert "\n" not in error


def test_duplicates_are_dropped_after_the_first(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = pairs(40)
    rows += [[f"  {rows[3][0]}\n", rows[3][1]], rows[7], rows[7]]
    validated = Checked(Data(train=write_csv(tmp_path / "t.csv", rows)), encoder)
    assert validated.found("duplicate") == [("train", row, True) for row in (41, 42, 43)]
    reasons = validated.rejected["reason"]
    assert [reason.rpartition(" ")[2] for reason in reasons] == ["4", "8", "8"]
    assert sum(map(len, validated.splits.values())) == 40


def test_held_out_splits_share_no_text(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = pairs(50)
    relabelled = [[text.replace(" ", "  "), "other"] for text, _ in rows[:20]]
    validated = Checked(Data(train=write_csv(tmp_path / "t.csv", rows + relabelled)), encoder)
    keys = [set(validated.splits[name]["text"].map(content_key)) for name in SPLITS]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert len(validated.found("conflict")) == 40
    assert validated.metrics["leaked_rows"] == 0


def leaking(folder: Path) -> dict[str, str]:
    """Write splits where train rows 2 and 3 are in test, and train 5 and test 1 in validation."""
    train, validation, test = pairs(30), pairs(10, seed=1), pairs(10, seed=2)
    test[4], test[6] = train[1], [train[2][0].replace(" ", "\n"), train[2][1]]
    validation[0] = train[4]
    validation[8] = test[0]
    return {
        name: write_csv(folder / f"{name}.csv", rows)
        for name, rows in zip(SPLITS, (train, validation, test), strict=True)
    }


def test_leaks_are_an_error_by_default(tmp_path: Path, encoder: TextEncoder) -> None:
    error = error_of(Data(**leaking(tmp_path)), encoder)
    assert "1 in train and validation, 2 in train and test, 1 in validation and test" in error
    assert f"{tmp_path}/train.csv row 2 and {tmp_path}/test.csv row 5" in error
    assert "set it to drop" in error
    assert "\n" not in error


def test_leaks_are_dropped_from_the_earlier_split(tmp_path: Path, encoder: TextEncoder) -> None:
    validated = Checked(Data(**leaking(tmp_path), on_leak="drop"), encoder)
    expected = [("train", 2, True), ("train", 3, True), ("train", 5, True), ("validation", 9, True)]
    assert validated.found("leak") == expected
    assert [len(validated.splits[name]) for name in SPLITS] == [27, 9, 10]
    assert validated.metrics["leaked_rows"] == 4


def test_leaks_are_kept_and_counted_with_warn(tmp_path: Path, encoder: TextEncoder) -> None:
    validated = Checked(Data(**leaking(tmp_path), on_leak="warn"), encoder)
    assert [dropped for *_, dropped in validated.found("leak")] == [False] * 4
    assert [len(validated.splits[name]) for name in SPLITS] == [30, 10, 10]
    assert validated.rejected.empty
    assert validated.metrics["leaked_rows"] == 4


def test_validation_is_held_out_after_leaks_are_dropped(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    files = leaking(tmp_path)
    del files["validation"]
    validated = Checked(Data(**files, on_leak="drop"), encoder)
    assert validated.found("leak") == [("train", 2, True), ("train", 3, True)]
    assert [len(validated.splits[name]) for name in SPLITS] == [26, 2, 10]


def test_conflicting_answers_are_reported_and_kept(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [*pairs(40), ["same", "ham"], ["same ", "spam"]]
    validated = Checked(Data(train=write_csv(tmp_path / "t.csv", rows)), encoder)
    conflicts = validated.findings[validated.findings["check"] == "conflict"]
    assert list(conflicts["row"]) == [41, 42]
    assert set(conflicts["reason"]) == {"has 2 different answers: 'ham', 'spam'"}
    assert conflicts["split"].nunique() == 1
    assert validated.rejected.empty


@pytest.mark.parametrize("task", ["classification", "completion"])
def test_cut_tokens_match_the_prompt_encoder(
    tmp_path: Path, encoder: TextEncoder, task: str
) -> None:
    first, second = ("text", "label") if task == "classification" else ("prompt", "completion")
    template = f"Read this: {{{first}}}\n\nAnswer:"
    rows = [[f"{text} {'é' * i}", label] for i, (text, label) in enumerate(pairs(60))]
    data = Data(
        train=write_csv(tmp_path / "t.csv", rows, (first, second)),
        task=task,
        prompt_template=template,
        max_length=96,
    )
    prompts = PromptEncoder(encoder, template, 96)
    validated = Checked(data, encoder)
    cut = {row.row: row.reason for row in validated.findings.itertuples()}
    assert set(validated.findings["check"]) == {"truncated"}
    for name in ("train", "validation"):
        rows, examples = validated.splits[name], validated.prepared.examples(name)
        for row, example in zip(rows.itertuples(), examples, strict=True):
            expected = prompts.example(getattr(row, first), getattr(row, second))
            assert example["input_ids"] == expected.ids
            assert example["learned"] == [expected.prompt_length, len(expected.ids)]
            assert example["length"] == len(expected.ids)
            reason = f"is truncated by {expected.cut_tokens} tokens"
            assert cut.get(row.row) == (reason if expected.cut_tokens else None)
    assert 0 < len(cut) < 60
    numbers = validated.metrics
    assert numbers["truncated_rows"] == len(cut)
    assert numbers["tokens_max"] > 96
    assert numbers["tokens"] <= 96 * 60


def test_answer_that_leaves_no_room_is_invalid(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [*pairs(40), ["a", "x" * 60]]
    data = Data(
        train=write_csv(tmp_path / "t.csv", rows), max_length=64, prompt_template="{text} ="
    )
    validated = Checked(data, encoder)
    assert validated.found("room") == [("train", 41, True)]
    assert validated.rejected["column"].tolist() == ["label"]


def test_completion_task(tmp_path: Path, encoder: TextEncoder) -> None:
    questions = sentences(40)
    rows = [[q, f"answer {i}"] for i, q in enumerate(questions)]
    rows += [[questions[0], "answer 0 "], [questions[1], "another answer"]]
    data = Data(
        train=write_csv(tmp_path / "t.csv", rows, ("question", "reply")),
        task="completion",
        prompt_column="question",
        completion_column="reply",
        prompt_template="{prompt}",
    )
    validated = Checked(data, encoder)
    assert validated.found("duplicate") == [("train", 41, True)]
    assert {row for _, row, _ in validated.found("conflict")} == {2, 42}
    assert [len(validated.splits[name]) for name in SPLITS] == [33, 4, 4]
    assert "labels" not in validated.metrics


def test_text_task_on_plain_text(tmp_path: Path, encoder: TextEncoder) -> None:
    lines = sentences(30)
    (tmp_path / "t.txt").write_text("\n\n".join([*lines, "word " * 30]) + "\n")
    data = Data(train=str(tmp_path / "t.txt"), task="text", text_row="line", max_length=96)
    validated = Checked(data, encoder)
    assert [len(validated.splits[name]) for name in SPLITS] == [25, 3, 3]
    assert validated.found("truncated") == []  # documents are packed, not truncated
    examples = [list(e["input_ids"]) for e in validated.prepared.examples("train")]
    assert {len(ids) for ids in examples[:-1]} == {96}  # packed to the last token
    learned = [e["learned"] for e in validated.prepared.examples("train")]
    assert learned == [[0, len(example)] for example in examples]
    stream = [token for ids in examples for token in ids]
    texts = validated.splits["train"]["text"]
    expected = [token for text in texts for token in (*encoder.encode(text), encoder.eos_id)]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) <= 1
    assert validated.metrics["train_tokens"] == len(expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pairs(20, ("ham",)), "has only one label, 'ham' in column label"),
        (pairs(2), "too few texts to hold out validation and test with at least two labels each"),
        (
            [*pairs(20), ["a", "Spam"], ["b", "spam "]],
            "labels 'spam' (11 rows) and 'Spam' (1 row)",
        ),
        ([*pairs(20, ("very good", "bad")), ["a", "very  good"]], "'very good' for all"),
    ],
    ids=["one-label", "two-rows", "case", "spaces"],
)
def test_unusable_labels_are_problems(
    tmp_path: Path, encoder: TextEncoder, rows: list, message: str
) -> None:
    error = error_of(Data(train=write_csv(tmp_path / "t.csv", rows)), encoder)
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pairs(9, ("ham", "eggs", "beans"), seed=1), "missing from train: 'beans', 'eggs'"),
        (pairs(9, ("ham",), seed=1), "the validation split has only one label, 'ham'"),
        ([["", "ham"]], "the validation split has no rows left"),
    ],
    ids=["unseen", "one-label", "no-valid-row"],
)
def test_unusable_validation_file_is_a_problem(
    tmp_path: Path, encoder: TextEncoder, rows: list, message: str
) -> None:
    train = write_csv(tmp_path / "t.csv", pairs(30))
    assert message in error_of(
        Data(train=train, validation=write_csv(tmp_path / "v.csv", rows)), encoder
    )


def test_dataset_without_valid_rows_raises(tmp_path: Path, encoder: TextEncoder) -> None:
    train = write_csv(tmp_path / "t.csv", [["", "a"], ["", "b"]])
    error = error_of(Data(train=train, max_invalid_fraction=1.0), encoder)
    assert "none of 2 rows is valid" in error


def test_template_that_leaves_no_room_raises(tmp_path: Path, encoder: TextEncoder) -> None:
    train = write_csv(tmp_path / "t.csv", pairs(9))
    data = Data(train=train, max_length=16, prompt_template="more than sixteen bytes {text}")
    assert "data.max_length = 16" in error_of(data, encoder)


def test_histogram_covers_every_row_once(tmp_path: Path, encoder: TextEncoder) -> None:
    letters = random.Random(3)
    rows = [
        ["".join(letters.choices(string.ascii_lowercase, k=length)), label]
        for length, (_, label) in enumerate(pairs(200), 1)
    ]
    train = write_csv(tmp_path / "t.csv", rows)
    validated = Checked(Data(train=train, max_length=100, prompt_template="{text}:"), encoder)
    table = token_lengths(validated.validated, 100)
    assert table.groupby("split")["rows"].sum().to_dict() == validated.validated.rows
    starts = table["tokens"].unique().tolist()
    assert starts[0] == 1 and starts[-1] == 101
    train_rows = validated.splits["train"]
    # One token per byte of the text, a colon, a space and the label, and the end-of-text token.
    tokens = train_rows["text"].str.len() + train_rows["label"].str.len() + 3
    ends = [*starts[1:], 10**9]
    by_hand = [tokens.between(low, end - 1).sum() for low, end in zip(starts, ends, strict=True)]
    assert table.loc[table["split"] == "train", "rows"].tolist() == by_hand
    assert by_hand[-1] == validated.validated.findings.count("truncated", split="train") > 0


def test_report_shows_numbers_and_examples(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [*pairs(60, ("<b>", "c")), ["`tick`\nnext", ""], ["x" * 400, "c"]]
    train = write_csv(tmp_path / "t.csv", [*rows, rows[0], [rows[1][0].upper(), "c"]])
    data = Data(train=train, max_length=128)
    checked = Checked(data, encoder)
    write_report(tmp_path / "report", checked.validated, data, checked.directory)
    page = (tmp_path / "report" / "report.html").read_text()
    words = html.unescape(re.sub(r"<[^>]+>|\s+", " ", page))
    words = " ".join(words.split())
    assert "<b>" not in page and "<b>" in words  # the HTML in a text is escaped
    assert "64 rows read" in words
    assert f"{train} row 61 train label is empty or only whitespace" in words
    assert f"{train} row 63 train text is the same as {train} row 1" in words
    assert f"{train} row 64 train text is nearly the same as {train} row 2" in words
    assert "is truncated by" in words and "2 rows were dropped" in words
    assert "http" not in page.replace("https://", "http://").split("<body>")[0]  # self-contained
    assert hashlib.sha256(Path(train).read_bytes()).hexdigest() in words
    labels = pd.read_csv(tmp_path / "report" / "labels.csv")
    assert labels.groupby("label")["rows"].sum().to_dict() == {"<b>": 30, "c": 32}
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["labels"] == 2


def test_a_split_whose_rows_are_all_in_a_later_split_is_said_first(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    train = write_csv(tmp_path / "t.csv", pairs(30))
    for policy in ("error", "drop"):
        for split in ("validation", "test"):
            same = write_csv(tmp_path / "v.csv", pairs(30))
            data = Data(train=train, on_leak=policy, **{split: same})
            (problem,) = error_of(data, encoder).splitlines()
            assert problem.startswith(f"all 30 rows of train are also in {split}:")


def test_the_limit_that_helps_is_named(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [[text, "y" * 200 if number % 4 else "x"] for number, text in enumerate(sentences(40))]
    train = write_csv(tmp_path / "t.csv", rows)
    error = error_of(Data(train=train, max_length=64), encoder)
    assert "raise data.max_length" in error and "data.max_length = 64" in error
    error = error_of(Data(train=train, labels=("x", "z")), encoder)
    assert "most labels are not in data.labels" in error
    cyrillic = "".join(map(chr, range(0x430, 0x450)))
    content = f"text,label\n{cyrillic},a\n{cyrillic[::-1]},b\n"
    (tmp_path / "k.csv").write_bytes(content.encode("koi8-r"))
    error = error_of(Data(train=str(tmp_path / "k.csv")), encoder)
    assert "none of 2 rows is valid; most rows are not in UTF-8: save the file" in error


def test_labels_of_minus_one_are_named_for_what_they_are(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    train = write_csv(tmp_path / "t.csv", pairs(30))
    test = write_csv(tmp_path / "v.csv", [[text, "-1"] for text in sentences(50)[40:]])
    (problem,) = error_of(Data(train=train, test=test), encoder).splitlines()
    assert problem.startswith("rows of test have the label -1, which train does not have; it marks")


def test_placeholders_of_images_are_findings(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = pairs(20)
    for number, mark in enumerate(("<image>", "<|image_1|>", "<audio>", "<img src=x>")):
        rows[number][0] += f" {mark}"
    found = Checked(Data(train=write_csv(tmp_path / "t.csv", rows)), encoder)
    assert [row for _, row, _ in found.found("placeholder")] == [1, 2, 3]


def test_the_same_error_in_many_files_is_one_line(tmp_path: Path, encoder: TextEncoder) -> None:
    for number in range(50):
        (tmp_path / f"f{number:02}.csv").write_text("a,b\n1,2\n")
    (tmp_path / "g.csv").write_text('text,label\n"a,b\n')
    first, second = error_of(Data(train=str(tmp_path)), encoder).splitlines()
    assert first.startswith(f"{tmp_path}/f00.csv has no column text")
    assert first.endswith(f"(and 49 more files, such as {tmp_path}/f01.csv)")
    assert second.startswith(f"{tmp_path}/g.csv line 2 column 1")
