"""What the pages of MLflow 3 show: logged models, tables of answers, descriptions of runs."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from gptj8.runtime.files import write_json
from gptj8.tracking.description import Changes, changes_since, run_note
from gptj8.tracking.examples import EXAMPLES, example_answers
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import params, report, runs

INLINE = pytest.mark.usefixtures("recorded_inline")
PREPARED = "0123456789abcdef0123456789abcdef.dir"


def export(folder: Path, weights: bytes = b"weights") -> None:
    """Write what the stages before `record` leave in a project."""
    for name in ("adapter", "export"):
        (folder / "artifacts" / name).mkdir(parents=True, exist_ok=True)
        (folder / "artifacts" / name / "adapter_model.safetensors").write_bytes(weights)
    (folder / "artifacts" / "export" / "README.md").write_text("# A model card\n")
    (folder / "artifacts" / "base-8bit").mkdir(exist_ok=True)
    (folder / "artifacts" / "base-8bit" / "manifest.json").write_text("{}")
    report("validate", rows=3)
    write_json("reports/validate/inputs.json", {"files": [], "prepared": PREPARED})
    report("convert", parameters=3)
    report("finetune", eval_loss=1.0)
    report("evaluate", base={"accuracy": 0.25}, tuned={"accuracy": 0.75, "accuracy_low": 0.5})
    report("export", identical_generations=24)


def record() -> None:
    with stage_run("record", params()):
        pass


@INLINE
def test_export_is_a_logged_model_with_metrics_and_dataset(project):
    export(project)
    record()
    client, (row,) = runs()
    (model,) = client.search_logged_models([row.info.experiment_id])
    assert model.source_run_id == row.info.run_id
    assert model.status == "READY"
    assert model.params["finetune.r"] == "8"
    metrics = {metric.key: metric for metric in model.metrics}
    assert metrics["evaluate/tuned/accuracy"].value == 0.75
    assert "evaluate/tuned/accuracy_low" not in metrics
    assert metrics["export/identical_generations"].value == 24
    assert {metric.dataset_name for metric in metrics.values()} == {"dataset"}
    assert {metric.dataset_digest for metric in metrics.values()} == {PREPARED}
    assert model.tags["adapter"] == f"runs:/{row.info.run_id}/adapter"
    uri = f"sqlite:///{project / 'mlflow.db'}"
    card = mlflow.artifacts.download_artifacts(
        f"{model.artifact_location}/README.md", tracking_uri=uri
    )
    assert Path(card).read_text() == "# A model card\n"
    # The run's history has no second point.
    assert len(client.get_metric_history(row.info.run_id, "evaluate/tuned/accuracy")) == 1


@INLINE
def test_the_same_export_again_is_no_second_model(project):
    export(project)
    for _ in range(2):
        with stage_run("export", params()):
            pass
    client, (row,) = runs()
    assert len(client.search_logged_models([row.info.experiment_id])) == 1
    export(project, b"others")
    with stage_run("export", params()):
        pass
    assert len(client.search_logged_models([row.info.experiment_id])) == 2


@INLINE
def test_weights_are_stored_once(project):
    export(project)
    record()
    stored = [path.parent.name for path in (project / "mlartifacts").rglob("*.safetensors")]
    assert stored == ["adapter"]
    (card,) = (project / "mlartifacts").glob("*/artifacts/export/README.md")
    assert card.is_file()


def prepare(folder: Path, rows: pd.DataFrame, template: str, chat: object = None) -> Path:
    dataset = folder / "dataset"
    dataset.mkdir()
    rows.to_parquet(dataset / "test.parquet")
    write_json(dataset / "dataset.json", {"prompt_template": template, "chat": chat})
    return dataset


def test_examples_have_whole_prompts_and_answers(tmp_path):
    count = EXAMPLES + 5
    texts = [f"{'long ' * 100}{number}" for number in range(count)]
    rows = pd.DataFrame({"file": "a.csv", "row": range(count), "text": texts, "label": "x"})
    dataset = prepare(tmp_path, rows, "Read: {text}\n\nLabel:")
    predictions = rows.assign(text=rows["text"].str[:120], base="y", tuned="x")
    predictions.to_csv(tmp_path / "predictions.csv", index=False)
    columns, table = example_answers(dataset, tmp_path / "predictions.csv")
    assert columns == ["prompt", "expected", "base", "tuned"]
    assert len(table) == EXAMPLES
    assert table[3] == [f"Read: {texts[3]}\n\nLabel:", "x", "y", "x"]


def test_examples_of_completions_and_of_conversations(tmp_path):
    rows = pd.DataFrame({"file": "a.csv", "row": [0], "prompt": ["Say: hi"], "completion": ["hi"]})
    dataset = prepare(tmp_path, rows, "{prompt}", {"template": "x", "learn": "all"})
    rows.assign(base_wrote="ho", tuned_wrote="hi").to_csv(tmp_path / "p.csv", index=False)
    _, table = example_answers(dataset, tmp_path / "p.csv")
    assert table == [["Say: hi", "hi", "ho", "hi"]]
    rows.head(0).assign(base_wrote="", tuned_wrote="").to_csv(tmp_path / "none.csv", index=False)
    assert example_answers(dataset, tmp_path / "none.csv") is None


@INLINE
def test_table_of_examples_is_read_by_mlflow(project):
    export(project)
    rows = pd.DataFrame({"file": "a.csv", "row": [0], "text": ["fox"], "label": ["x"]})
    prepare(project / "artifacts", rows, "{text}:")
    rows.assign(base="y", tuned="x").to_csv("reports/evaluate/predictions.csv", index=False)
    for _ in range(2):  # a table is replaced, not appended to
        with stage_run("evaluate", params()):
            pass
    client, (row,) = runs()
    table = client.load_table(row.info.experiment_id, "examples.json", [row.info.run_id])
    assert table.to_dict("records") == [
        {"prompt": "fox:", "expected": "x", "base": "y", "tuned": "x"}
    ]
    listed = {item["path"] for item in json.loads(row.data.tags["mlflow.loggedArtifacts"])}
    assert listed == {"examples.json", "predictions.json"}


def measured(accuracy: float) -> dict[str, float]:
    return {"evaluate/base/accuracy": 0.25, "evaluate/tuned/accuracy": accuracy}


def test_first_line_tells_outcome_and_change():
    tags = {"params.changed": "finetune.r=4", "code.changed": "training/loss.py\na b.py"}
    first = run_note(measured(0.75), tags).splitlines()[0]
    assert first == (
        "**Accuracy 25.0% → 75.0%** · Changed: `finetune.r=4`, code (training/loss.py, a b.py)"
    )
    many = "seed=3 data.text_column='two words' finetune.r=4 finetune.optim=adam export.merge=true"
    assert run_note({}, {"params.changed": many}).splitlines()[0] == (
        "Changed: `seed=3`, `data.text_column='two words'`, `finetune.r=4`, "
        "`finetune.optim=adam` and 1 more"
    )
    written = {"evaluate/base/exact_match": 0.0, "evaluate/tuned/exact_match": 0.5}
    since = Changes("earlier", ["finetune.r=4", "code", "torch 2.12.0 → 2.13.0"])
    assert run_note(written, {}, since).splitlines()[0] == (
        "**Exact match 0.0% → 50.0%** · "
        "Changed since earlier: `finetune.r=4`, `code`, `torch 2.12.0 → 2.13.0`"
    )


@INLINE
def test_changes_since_the_last_run_are_found(project):
    export(project)
    with stage_run("export", params()):
        pass
    (project / "rows.csv").write_text("text,label\nother,row\n")
    with stage_run("export", params(finetune={"r": 4})):
        pass
    _, rows = runs()
    new, old = rows
    assert changes_since(old, new).what == ["finetune.r=4", "contents of data.train"]
    note = new.data.tags["mlflow.note.content"]
    assert f"Changed since {old.info.run_name}: `finetune.r=4`, `contents of data.train`" in note
