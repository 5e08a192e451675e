"""The stage writes a report from a prepared dataset, two models and an adapter."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score

import stages.evaluate as stage
from gptj8.evaluation.systems import OWN_SYSTEMS
from gptj8.runtime.errors import UserError
from tests.helpers.prepared_dataset import write_prepared

WORDS = {"sql": "table select join", "fox": "quick brown fox", "dog": "lazy dog"}
COSTS = {"seconds", "tokens_per_second", "peak_memory_gib"}
FILES = {
    "comparisons.csv",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "per_class.csv",
    "perplexity.csv",
    "predictions.csv",
    "reliability.csv",
    "reliability.png",
}


def is_cost(key):
    return key.rpartition("/")[2] in COSTS


def frames(task):
    rows = [(f"{words} {number}", label) for number in range(6) for label, words in WORDS.items()]
    columns = {"classification": ["text", "label"], "completion": ["prompt", "completion"]}
    frame = pd.DataFrame(rows, columns=columns.get(task, ["text", "unused"]))
    frame["file"], frame["row"] = "rows.csv", range(1, len(frame) + 1)
    return {
        name: frame.drop(columns="unused", errors="ignore")
        for name in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, encoder):
    """Directories of a model, a slightly different converted model and an adapter."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    model = make_model("gptj")
    for name in ("original", "converted"):
        model.save_pretrained(folder / name)
        encoder._tokenizer.save(str(folder / name / "tokenizer.json"))
        content = json.dumps({"eos_token": "<|endoftext|>"})
        (folder / name / "tokenizer_config.json").write_text(content)
        model.transformer.h[0].mlp.fc_in.weight.data.mul_(1.001)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    Path("original").symlink_to(models / "original")
    monkeypatch.setattr(stage, "BASE", models / "converted")
    monkeypatch.setattr(stage, "ADAPTER", models / "adapter")
    monkeypatch.setattr(stage, "stage_run", lambda *args: nullcontext())

    def run(task, **evaluate):
        field = "prompt" if task == "completion" else "text"
        template = f"{{{field}}}\n\nLabel:"
        settings = "".join(f"  {key}: {value}\n" for key, value in evaluate.items())
        Path("params.yaml").write_text(
            f"data:\n  train: rows.csv\n  task: {task}\n  max_length: 64\n"
            f"  prompt_template: {json.dumps(template)}\n"
            f"model:\n  path: original\n"
            f"evaluate:\n  bootstrap_resamples: 100\n{settings}"
        )
        write_prepared(Path("artifacts/dataset"), task, frames(task), template)
        stage.main()
        return json.loads(Path("reports/evaluate/metrics.json").read_text())

    return run


def table(name):
    with open(Path("reports/evaluate") / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_classification(project):
    metrics = project("classification", few_shot=2)
    systems = {"baseline", "base", "quantized", "few_shot", "tuned"}
    assert systems == set(OWN_SYSTEMS)
    measured = {"base", "quantized", "tuned"}
    prompted = {"base", "quantized", "few_shot", "tuned"}
    interval = ("", "_low", "_high")
    assert {key for key in metrics if not is_cost(key)} == {
        *(f"{system}/accuracy{end}" for system in systems for end in interval),
        *(f"{system}/macro_f1" for system in systems),
        *(f"{system}/exact_match{end}" for system in prompted for end in interval),
        *(f"{system}/{name}" for system in prompted for name in ("accuracy_normalized", "ece")),
        *(f"{system}/perplexity" for system in measured),
        *(f"{system}/perplexity_ratio{e}" for system in measured - {"base"} for e in interval),
        *(f"quantized/{m}{e}" for m in ("kl_divergence", "top1_agreement") for e in interval),
        *(f"tuned/accuracy_minus_{s}{e}" for s in systems - {"tuned"} for e in interval),
        *(f"tuned/p_value_against_{system}" for system in systems - {"tuned"}),
    }
    assert {f"{system}/seconds" for system in systems} <= set(metrics)
    assert {path.name for path in Path("reports/evaluate").iterdir()} == FILES | {"metrics.json"}
    assert metrics["baseline/accuracy"] == 1  # fitted on the same rows
    assert metrics["quantized/perplexity_ratio"] == pytest.approx(
        metrics["quantized/perplexity"] / metrics["base/perplexity"]
    )
    low, high = (metrics[f"quantized/perplexity_ratio_{end}"] for end in ("low", "high"))
    assert low < metrics["quantized/perplexity_ratio"] < high
    assert metrics["tuned/perplexity"] != metrics["quantized/perplexity"]

    predictions, confusion = table("predictions.csv"), table("confusion_matrix.csv")
    assert len(predictions) == len(confusion) == len(table("perplexity.csv")) == 18
    for system in systems:
        labels = [row["label"] for row in predictions]
        accuracy = accuracy_score(labels, [row[system] for row in predictions])
        assert metrics[f"{system}/accuracy"] == accuracy
    assert [row["predicted"] for row in confusion] == [row["tuned"] for row in predictions]
    for system in systems:
        assert all(0 < float(row[f"{system}_confidence"]) <= 1 for row in predictions)
        if system != "baseline":
            assert all(0 < float(row[f"{system}_wrote_confidence"]) <= 1 for row in predictions)
    # The expected calibration error is computed from the likelihoods; here from the table.
    for system in prompted:
        sure = np.array([float(row[f"{system}_confidence"]) for row in predictions])
        right = np.array([row[system] == row["label"] for row in predictions])
        bins = np.ceil(sure * 15)
        error = sum(abs(sure[bins == b].sum() - right[bins == b].sum()) for b in set(bins))
        assert metrics[f"{system}/ece"] == pytest.approx(error / len(sure), abs=1e-5)

    first = {name: (Path("reports/evaluate") / name).read_bytes() for name in FILES}
    again = project("classification", few_shot=2)
    assert {key: again[key] for key in again if not is_cost(key)} == {
        key: metrics[key] for key in metrics if not is_cost(key)
    }
    assert first == {name: (Path("reports/evaluate") / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("task", ["completion", "text"])
def test_only_perplexity_without_labels(project, task):
    metrics = project(task, max_perplexity_documents=5)
    assert {key for key in metrics if "accuracy" in key or "f1" in key} == set()
    assert {"base/perplexity", "quantized/perplexity", "tuned/perplexity"} <= set(metrics)
    assert {path.name for path in Path("reports/evaluate").iterdir()} == FILES | {"metrics.json"}
    rows = table("perplexity.csv")
    assert len(rows) == 5
    if task == "completion":  # only the completion and its end token, not the prompt
        assert max(int(row["tokens"]) for row in rows) <= 6


def test_separate_text_for_perplexity(project):
    Path("held-out.txt").write_text(
        "the lazy dog " * 6 + "\n\n" + "the quick brown fox " * 40 + "\n"
    )
    metrics = project("classification", few_shot=0, perplexity_text="held-out.txt")
    rows = table("perplexity.csv")
    assert [(row["file"], row["row"]) for row in rows] == [
        ("held-out.txt", "1"),
        ("held-out.txt", "3"),
    ]
    assert int(rows[1]["tokens"]) > 64  # longer than the context: split into windows
    assert "few_shot/accuracy" not in metrics


def test_empty_text_for_perplexity_raises(project):
    Path("held-out.csv").write_text("text,other\n  ,x\n")
    with pytest.raises(UserError, match=r"evaluate.perplexity_text = held-out.csv"):
        project("classification", perplexity_text="held-out.csv")


def test_too_many_examples_raise_before_a_model_is_loaded(project, monkeypatch):
    monkeypatch.setattr(
        "gptj8.evaluation.run.load_original", lambda *a, **k: pytest.fail("loaded a model")
    )
    with pytest.raises(UserError, match=r"evaluate.few_shot = 40"):
        project("classification", few_shot=40)


def test_external_predictions_are_in_the_report(project):
    lines = [f"{number},{'sql' if number % 2 else 'nonsense'}" for number in range(1, 19)]
    Path("external.csv").write_text("\n".join(["row,prediction", *lines]) + "\n")
    metrics = project("classification", few_shot=0, predictions="external.csv")
    predictions = table("predictions.csv")
    assert "external_confidence" not in predictions[0]
    labels = [row["label"] for row in predictions]
    assert metrics["external/accuracy"] == accuracy_score(
        labels, [r["external"] for r in predictions]
    )
    assert "tuned/p_value_against_external" in metrics
    pairs = [(row["first"], row["second"]) for row in table("comparisons.csv")]
    assert ("external", "tuned") in pairs


def test_incomplete_predictions_raise_before_a_model_is_loaded(project, monkeypatch):
    monkeypatch.setattr(
        "gptj8.evaluation.run.load_original", lambda *a, **k: pytest.fail("loaded a model")
    )
    Path("external.csv").write_text("row,prediction\n1,sql\n")
    with pytest.raises(UserError, match=r"external\.csv"):
        project("classification", predictions="external.csv")
