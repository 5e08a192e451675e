"""Approaches run as DVC experiments, and their table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptj8.params.sections import parse_params
from gptj8.runtime.errors import UserError
from gptj8.tracking import approaches
from gptj8.tracking.approaches import check_names
from gptj8.tracking.approaches_table import Outcome, markdown_table, table_rows, write_table
from tests.helpers.project_clone import ANIMALS, MAGIC, Clone, write_rows

EVALUATE = {
    "tuned/accuracy": 0.8432,
    "tuned/accuracy_low": 0.81,
    "tuned/accuracy_high": 0.87,
    "tuned/macro_f1": 0.8,
    "tuned/seconds": 12.0,
    "base/accuracy": 0.4,
    "base/perplexity": 43.2,
    "quantized/perplexity_ratio": 1.0,
    "a|b/accuracy": 0.5,
    "baseline/accuracy": 0.855,
    "seconds": 30.0,
}
FINETUNE = {"trainable_parameters": 1234567, "seconds": 1234.5, "peak_memory_gib": 2.638}


def outcomes(**changes) -> list[Outcome]:
    metrics = {"finetune": FINETUNE, "evaluate": EVALUATE} | changes
    return [Outcome("layernorm", "layernorm-1", None), Outcome("lora-attention", "lora-2", metrics)]


def test_table_rows_include_approaches_and_untrained_systems():
    rows = table_rows(outcomes())
    assert [(row["approach"], row["status"]) for row in rows] == [
        ("layernorm", "failed"),
        ("lora-attention", "trained"),
        ("base", "evaluated"),
        ("baseline", "evaluated"),
        ("a|b", "evaluated"),
    ]
    assert rows[0]["experiment"] is None
    assert rows[1]["experiment"] == rows[2]["experiment"] == "lora-2"
    assert rows[1]["accuracy_high"] == 0.87
    assert rows[1]["training_seconds"] == 1234.5
    assert rows[1]["evaluation_seconds"] == 12.0
    assert rows[2]["training_seconds"] is None  # "seconds" of the evaluation covers all systems
    assert len({tuple(row) for row in rows}) == 1


def test_markdown_table_formats_values():
    lines = markdown_table(table_rows(outcomes())).splitlines()
    assert "accuracy (95 % interval)" in lines[0]
    assert "perplexity" not in lines[0]
    assert "evaluation: peak GiB" not in lines[0]  # not measured
    assert len({len(line) for line in lines if "\\|" not in line}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[2] == ["LayerNorms only: failed", *[""] * 6]
    assert cells[3] == [
        "LoRA on attention",
        "84.3% (81.0% to 87.0%)",
        "0.800",
        "1,234,567",
        "2.64",
        "1,234.5",
        "12.0",
    ]
    assert cells[4][:2] == ["base model, not trained", "40.0%"]
    assert "a\\|b" in lines[6]


def test_table_without_labels_shows_perplexity_and_loss():
    evaluate = {"tuned/perplexity": 20.5, "base/perplexity": 43.25, "quantized/perplexity": 43.3}
    rows = table_rows(outcomes(evaluate=evaluate, finetune={**FINETUNE, "eval_loss": 2.5}))
    table = markdown_table(rows)
    assert [row["approach"] for row in rows[2:]] == ["quantized", "base"]
    assert "accuracy" not in table
    assert "macro-F1" not in table
    assert "20.500" in table
    assert "2.5000" in table


def test_table_with_only_failed_approaches():
    rows = table_rows([Outcome("layernorm", "layernorm-1", None)])
    assert markdown_table(rows).splitlines()[2] == "| LayerNorms only: failed |"


def test_write_table_writes_csv_and_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, text = write_table(table_rows(outcomes()))
    read = list(csv.DictReader(table.open()))
    assert read[1]["accuracy"] == "0.8432"
    assert read[0]["accuracy"] == ""
    assert text.read_text().startswith("| approach ")


def test_failed_approach_raises_after_table_is_written(tmp_path, monkeypatch, capsys):
    recorded = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(approaches, "overridden_params", lambda overrides: None)
    monkeypatch.setattr(approaches, "run_approaches", lambda names, overrides: outcomes())
    monkeypatch.setattr("gptj8.tracking.comparison.log_comparison", lambda *a: recorded.append(a))
    with pytest.raises(UserError, match="layernorm: the experiment failed"):
        approaches.compare(["layernorm", "lora-attention"])
    assert "LoRA on attention" in capsys.readouterr().out
    assert len(recorded) == 1
    assert (tmp_path / "reports" / "approaches" / "approaches.csv").is_file()


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["lora-atention"], ["lora-atention", "did you mean lora-attention?", "known: layernorm"]),
        (["layernorm", "layernorm"], ["layernorm appears more than once"]),
        ([], ["--approaches is empty"]),
    ],
)
def test_invalid_approach_names_raise(names, parts):
    with pytest.raises(UserError) as error:
        check_names(names)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("finetune.r", "key=value"),
        ("finetune.rr=3", "finetune.rr"),
        ("finetune.r=0", "finetune.r = 0"),
    ],
)
def test_invalid_override_raises_before_anything_runs(tmp_path, monkeypatch, change, part):
    content = "data: {train: rows.csv}\nmodel: {path: m}\nfinetune: {r: 8}\n"
    (tmp_path / "params.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=part):
        approaches.overridden_params([change])
    assert approaches.overridden_params(["finetune.r=4"]).finetune.r == 4
    assert (tmp_path / "params.yaml").read_text() == content


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A project with tracked and untracked files."""
    monkeypatch.chdir(tmp_path)
    for name in ("gptj8/known.py", "data/known.csv"):
        Path(name).parent.mkdir()
        Path(name).touch()
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "."], check=True)
    others = ("gptj8/new.py", "gptj8/__pycache__/x.pyc", "data/new.csv", "rows.csv")
    for name in (*others, "mine/train.csv", "mine/test.csv", "models/a/config.json", "big/out.csv"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()
    return tmp_path


def copied(outs=(), **data) -> list[str]:
    params = parse_params({"data": data, "model": {"path": "models/a"}})
    made = {Path(out): Path(by) for out, by in dict(outs).items()}
    return [path.as_posix() for path in approaches.paths_to_copy(params, made)]


def test_untracked_inputs_and_code_are_copied(repository):
    # The folder of mine/train.csv is untracked, so the complete folder is copied: DVC copies a file
    # only into an existing folder.
    assert copied(train="mine/train.csv") == ["mine", "models/a", "gptj8/new.py"]
    assert copied(train="rows.csv") == ["rows.csv", "models/a", "gptj8/new.py"]
    assert copied(train="data") == ["data/new.csv", "models/a", "gptj8/new.py"]
    assert copied(train="data/known.csv") == ["models/a", "gptj8/new.py"]
    assert copied(train="mine", test="mine/test.csv") == ["mine", "models/a", "gptj8/new.py"]


def test_dvc_outputs_are_not_copied(repository):
    outs = {"big/out.csv": "data/known.csv", "models": "data/known.csv"}
    assert copied(outs, train="big/out.csv") == ["gptj8/new.py"]


def test_inputs_missing_in_experiment_copies_raise(repository):
    with pytest.raises(UserError, match="git add big"):
        copied({"big/out.csv": "big/dvc.yaml"}, train="big/out.csv")


def state(clone: Clone) -> dict[str, object]:
    """Return the state of the workspace, which compare must not change."""
    files = [f for f in (clone.folder / "artifacts").rglob("*") if f.is_file()]
    return {
        "status": clone.git("status", "--porcelain", "--untracked-files=all"),
        "params": (clone.folder / "params.yaml").read_bytes(),
        "artifacts": {f: f.read_bytes() for f in files},
    }


PROGRAM = """
import json, sys
from gptj8.tracking.approaches import run_approaches, table_rows, write_table
from gptj8.runtime.process import run
run(lambda: write_table(table_rows(run_approaches(json.loads(sys.argv[1])))))
"""


def compare(clone: Clone, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(names)],
        cwd=clone.folder,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": ""},
    )


def experiments(clone: Clone) -> dict[str, str]:
    listed = clone.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {name.rpartition("/")[2]: name for name in listed}


@pytest.mark.slow
def test_compare_runs_experiments_without_changing_workspace(tiny_model_dir, tmp_path):
    clone = Clone(tmp_path / "project", tiny_model_dir)
    # A realistic workspace: uncommitted changes and an untracked file.
    write_rows(clone.folder / "mine.csv", "text", "label", {"animals": ANIMALS, "magic": MAGIC})
    clone.edit_params(data={"train": "mine.csv"}, finetune={"r": 2})
    (clone.folder / "artifacts" / "mine.txt").write_text("mine")
    before = state(clone)

    process = compare(clone, "layernorm", "lora-attention")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "copied for each experiment" in process.stdout
    after = state(clone)
    made = "?? reports/approaches/approaches.csv\n?? reports/approaches/approaches.md\n"
    assert after["status"].replace(made, "") == before["status"]
    assert {**after, "status": ""} == {**before, "status": ""}

    known = experiments(clone)
    assert {name.rpartition("-")[0] for name in known} == {"layernorm", "lora-attention"}
    assert set(clone.dvc("exp", "list", "--name-only").stdout.split()) == set(known)
    with open(clone.folder / "reports" / "approaches" / "approaches.csv") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows[:2]:
        show = f"{known[row['experiment']]}:reports"
        finetune = json.loads(clone.git("show", f"{show}/finetune/metrics.json"))
        evaluate = json.loads(clone.git("show", f"{show}/evaluate/metrics.json"))
        assert row["experiment"].startswith(row["approach"])
        assert float(row["trainable_parameters"]) == finetune["trainable_parameters"]
        assert float(row["training_seconds"]) == finetune["seconds"]
        assert float(row["macro_f1"]) == evaluate["tuned/macro_f1"]
    # Two layers, two projections, rank 2: the uncommitted change was used.
    assert float(rows[1]["trainable_parameters"]) == 2 * 2 * 2 * (64 + 64)
    assert {row["approach"] for row in rows[2:]} >= {"base", "baseline", "few_shot"}

    again = compare(clone, "lora-attention")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Stage 'finetune' is cached" in again.stdout
    assert "Running stage 'finetune'" not in again.stdout
    assert experiments(clone) == known
    with open(clone.folder / "reports" / "approaches" / "approaches.csv") as stream:
        assert next(csv.DictReader(stream)) == rows[1]
