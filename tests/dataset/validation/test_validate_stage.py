"""Tests of the stage `validate` as a user runs it, in its own process."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from tests.helpers.labelled_rows import pairs, sentences, write_csv
from tests.helpers.validate_project import contents, files, make_project, run_stage, write_params


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def test_stage_on_user_csv(project: Path) -> None:
    rows = [[f'{text},\n"quoted"', label] for text, label in pairs(60, ("very good", "not good"))]
    table = [["7", *row] for row in [rows[0], *rows, ["", "not good"]]]
    write_csv(project / "mine.csv", table, ("id", "tweet", "class"))
    write_params(project, text_column="tweet", label_column="class")
    done = run_stage(project)
    assert done.returncode == 0, done.stderr
    assert "found empty texts: 1; duplicates within a split: 1\n" in done.stdout
    assert "62 rows read: 48 train, 6 validation, 6 test; 2 dropped" in done.stdout
    dataset = load_prepared(project / "artifacts" / "dataset")
    assert dataset.labels == ("not good", "very good")
    kept = pd.concat(dataset.split(name) for name in SPLITS)
    assert sorted(kept[["text", "label"]].values.tolist()) == sorted(rows)
    assert set(kept["file"]) == {"mine.csv"}
    rejected = pq.read_table(project / "artifacts" / "dataset" / "rejected.parquet").to_pylist()
    assert [(row["row"], row["check"], row["column"]) for row in rejected] == [
        (62, "empty", "tweet"),
        (2, "duplicate", "tweet"),
    ]
    reports = files(project / "reports" / "validate")
    tables = {"metrics.json", "inputs.json", "labels.csv", "token_lengths.csv"}
    assert reports == {*tables, "report.html"}
    numbers = json.loads((project / "reports" / "validate" / "metrics.json").read_text())
    assert numbers["rows"] == 62 and numbers["rows_per_second"] > 0
    assert not files(project.parent / "home")

    before = contents(project)
    assert run_stage(project).returncode == 0
    after = contents(project)
    speeds = "reports/validate/metrics.json"
    assert {k: v for k, v in after.items() if k != speeds} == {
        k: v for k, v in before.items() if k != speeds
    }


def test_stage_on_integer_labels_without_torch(project: Path) -> None:
    records = [{"text": t, "label": i % 3} for i, t in enumerate(sentences(60))]
    (project / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_params(project, train="mine.jsonl")
    code = (
        "import sys; from stages.validate import main; main(); "
        "sys.exit(3 if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    done = run_stage(project, code)
    assert done.returncode == 0, done.stderr
    assert load_prepared(project / "artifacts" / "dataset").labels == ("0", "1", "2")


BAD_INPUT = {
    "missing-file": (
        {"train": "mime.csv"},
        None,
        "mime.csv does not exist, did you mean mine.csv?",
    ),
    "missing-column": ({"text_column": "tweet"}, None, "mine.csv has no column tweet"),
    "empty-file": ({}, "", "mine.csv is empty"),
    "no-rows": ({}, "text,label\n", "mine.csv has no rows"),
    "one-label": ({}, "text,label\na,x\nb,x\nc,x\n", "mine.csv has only one label, 'x'"),
    "leak": (
        {"test": "same.csv"},
        None,
        "all 40 rows of train are also in test",
    ),
    "wrong-type": ({"train": "n.jsonl"}, None, "n.jsonl row 1: text is an integer, not text ('1')"),
    "ragged": ({}, "text,label\na,b,c\n", "mine.csv row 1: has 3 cells on line 2"),
    "pattern": ({"train": "*.csv"}, None, "set data.train: . and data.train_files: *.csv"),
    "hub": ({"train": "hf://datasets/a/b"}, None, "data/datasets/hub/params.yaml"),
    "wrong-param": ({"task": "chat"}, None, "params.yaml: data.task = 'chat'"),
}


@pytest.mark.parametrize(("params", "content", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_prints_one_error_line(
    project: Path, params: dict, content: str | None, message: str
) -> None:
    if content is not None:
        (project / "mine.csv").write_text(content)
    numbers = [{"text": i, "label": i % 2} for i in range(1, 10)]
    (project / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    write_params(project, **params)
    before = files(project)
    done = run_stage(project)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(done.stdout.splitlines()) <= 1  # the first line of the stage, no success message
    report = {"reports/validate/report.html", "reports/validate/findings.parquet"}
    assert files(project) - report == before
    assert not files(project.parent / "home")


def test_missing_model_raises(project: Path) -> None:
    (project / "model").rename(project / "elsewhere")
    done = run_stage(project)
    assert done.returncode == 2
    assert done.stderr == "error: model.path = model is not a model directory\n"


def test_stage_on_conversations(project: Path) -> None:
    rows = [
        {"messages": [{"from": "human", "value": text}, {"from": "gpt", "value": "Fine."}]}
        for text in sentences(40)
    ]
    (project / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": "mine.jsonl", "task": "completion", "prompt_template": "{messages}"}
    write_params(project, **settings, chat_template="raises.jinja")
    (project / "raises.jinja").write_text("{{ raise_exception('only for admins') }}")
    done = run_stage(project)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error == (
        "error: a question with an answer is refused by data.chat_template = raises.jinja: only "
        "for admins"
    )
    assert "Traceback" not in done.stderr
    assert not (project / "artifacts" / "dataset").exists()
    write_params(project, **settings)
    done = run_stage(project)
    assert done.returncode == 0, done.stderr
    assert "conversations are written in plain words (no chat template)" in done.stdout
    dataset = load_prepared(project / "artifacts" / "dataset")
    assert dataset.chat is not None and dataset.chat.learn == "all"
