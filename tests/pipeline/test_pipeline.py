"""The real pipeline, run by DVC in a temporary clone with a small model and a small dataset."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from ruamel.yaml import YAML

from tests.helpers.project_clone import (
    ANIMALS,
    MAGIC,
    STAGES,
    Clone,
    assert_complete,
    ran,
    write_rows,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    return Clone(tmp_path_factory.mktemp("clone") / "project", tiny_model_dir)


@pytest.fixture(scope="module")
def first_run(clone):
    return clone.dvc("repro")


def test_pipeline_exports_an_adapter(clone, first_run):
    assert ran(first_run) == list(STAGES)
    evaluation = clone.metrics("evaluate")
    flat = json.dumps(evaluation)
    for key in ("perplexity_ratio", "accuracy", "macro_f1", "perplexity"):
        assert key in flat
    assert clone.metrics("export")["max_logit_difference"] == 0.0
    assert clone.metrics("convert")["relative_rmse"] < 0.007
    exported = {f.name for f in (clone.folder / "artifacts" / "export").iterdir()}
    assert exported >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "params.json",
        "tokenizer.json",
    }


# DVC's own output.
DVC_LINES = (
    r"Running stage '\w+':|> python -m stages\.\w+|(Generating|Updating) lock file 'dvc.lock'"
    r"|To track the changes with git, run:|\tgit add .*|To enable auto staging, run:"
    r"|\tdvc config core.autostage true|Use `dvc push` .*"
)


def test_log_contains_only_stage_lines(clone, first_run):
    for line in filter(None, first_run.stdout.splitlines()):
        assert re.fullmatch(rf"{DVC_LINES}|({'|'.join(STAGES)}|record): .+|  .*", line), line
    for line in first_run.stderr.splitlines():  # no bar, dict or library warning
        assert re.fullmatch(r"finetune: training: \d+ of 24 steps, .+ (left|took .+)", line), line
    assert "\r" not in first_run.stdout + first_run.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stage_logs_reason_and_result(clone, first_run, stage):
    lines = [line for line in first_run.stdout.splitlines() if line.startswith(f"{stage}: ")]
    assert lines[0] == f"{stage}: first run"
    assert len(lines) >= 3
    assert re.search(r"; [\d.]+ s$", lines[-1])


def test_skipped_stages_are_logged(clone, first_run):
    again = clone.dvc("repro", "validate", "convert")
    for stage in ("validate", "convert"):
        assert f"Stage '{stage}' didn't change, skipping" in again.stdout


def test_first_run_is_one_complete_mlflow_run(clone, first_run):
    client = clone.client()
    (run,) = clone.runs().values()
    assert_complete(run, clone)
    assert len(client.get_metric_history(run.info.run_id, "finetune/loss")) > 3
    folders = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert folders >= {"adapter", "export", "reports"}
    assert {item.path for item in client.list_artifacts(run.info.run_id, "reports")} == {
        f"reports/{stage}" for stage in STAGES
    }


def test_dataset_inputs_have_dvc_digests(clone, first_run):
    lock = YAML(typ="safe").load((clone.folder / "dvc.lock").read_text())["stages"]["validate"]
    digests = {item["path"]: item["md5"] for item in (*lock["deps"], *lock["outs"])}
    (run,) = clone.runs().values()
    inputs = {
        item.dataset.name: (item.dataset.digest, item.tags[0].value)
        for item in run.inputs.dataset_inputs
    }
    assert inputs == {
        "rows.csv": (digests["rows.csv"], "train"),
        "dataset": (digests["artifacts/dataset"], "prepared"),
    }


def test_second_repro_does_nothing(clone, first_run):
    again = clone.dvc("repro")
    assert ran(again) == []
    assert "up to date" in again.stdout
    assert len(clone.runs()) == 1


def test_only_results_change_in_working_tree(clone, first_run):
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    assert all(name == "dvc.lock" or name.startswith("reports/") for name in changed), changed


def test_same_seed_gives_byte_identical_adapter(clone, first_run):
    before, metrics = clone.adapter_digest(), clone.metrics("finetune")
    forced = clone.dvc("repro", "--force", "--single-item", "finetune")
    assert ran(forced) == ["finetune"]
    assert "finetune: rerun: forced, or its outputs were changed" in forced.stdout
    assert clone.adapter_digest() == before
    timed = {"seconds", "tokens_per_second", "samples_per_second"}
    timed |= {"peak_memory_gib", "estimated_memory_gib"}  # library memory varies
    again = clone.metrics("finetune")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in metrics.items() if k not in timed
    }


def test_auto_batch_size_equals_explicit_batch_size(clone, first_run, monkeypatch, tmp_path):
    from gptj8.memory import fitting
    from stages import finetune

    def train(**changes):
        clone.edit_params(finetune=changes, tracking={"uri": None})
        finetune.main()
        found = clone.metrics("finetune")
        sizes = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
        return sizes, clone.adapter_digest()

    def room_for_five(estimator, params, memory, choose=fitting.choose_fit):
        assert memory > estimator.training(12).total  # the real machine has more memory
        return choose(estimator, params, estimator.training(5).total)

    monkeypatch.chdir(clone.folder)
    monkeypatch.setattr("gptj8.memory.training_memory.choose_fit", room_for_five)
    results = [clone.folder / name for name in ("artifacts/adapter", "reports/finetune")]
    for number, folder in enumerate(results):
        shutil.copytree(folder, tmp_path / str(number))
    auto = {"per_device_train_batch_size": "auto", "train_batch_size": 12}
    try:
        sizes, chosen = train(**auto)
        assert sizes == (4, 3)
        numbers = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
        assert train(**numbers, train_batch_size=None) == ((4, 3), chosen)
        other = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
        assert train(**other)[1] != chosen  # differs at least by rounding
    finally:
        clone.git("checkout", "--", "params.yaml")
        for number, folder in enumerate(results):  # restore the results of DVC's stage
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / str(number), folder)


def test_failed_gate_registers_no_version(clone, first_run):
    client = clone.client()
    name = ["-S", "tracking.registered_model_name=animals"]
    rejected = clone.dvc("exp", "run", *name, "-S", "evaluate.require=['tuned/accuracy > 2']")
    assert rejected.returncode != 0
    assert [s for s in STAGES if f"Running stage '{s}'" in rejected.stdout] == ["export"]
    reason = "evaluate.require is ['tuned/accuracy > 2'] (was [])"
    assert f"export: runs because {reason}" in rejected.stdout
    errors = [line for line in rejected.stderr.splitlines() if line.startswith("error: ")]
    assert "tuned/accuracy > 2 is not met" in errors[0] and "misses by" in errors[0]
    assert "exited with 2" in rejected.stderr
    assert not client.search_registered_models()
    assert not (clone.folder / "artifacts" / "export").exists()

    accepted = clone.dvc("exp", "run", *name, "-S", "evaluate.require=['tuned/accuracy >= 0']")
    assert ran(accepted) == ["export"]
    (version,) = client.search_model_versions("name = 'animals'")
    accuracy = clone.metrics("evaluate")["tuned/accuracy"]
    assert version.tags["evaluate.tuned.accuracy"] == f"{accuracy:.6g}"
    run = client.get_run(version.run_id)
    assert run.data.metrics["evaluate/tuned/accuracy"] == pytest.approx(accuracy)
    clone.git("checkout", "--", "params.yaml")


def test_experiments_rerun_changed_stages_and_are_complete_runs(clone, first_run):
    known = set(clone.runs())
    assert ran(clone.dvc("exp", "run", "-S", "finetune.r=4")) == ["finetune", "evaluate", "export"]
    (new,) = set(clone.runs()) - known
    assert_complete(clone.runs()[new], clone)
    assert clone.runs()[new].data.tags["stage.convert"] == "cached"
    assert len(clone.runs()[new].inputs.dataset_inputs) == 2  # validate did not run

    known |= {new}
    assert ran(clone.dvc("exp", "run", "-S", "evaluate.few_shot=2")) == ["evaluate", "export"]
    (new,) = set(clone.runs()) - known
    assert_complete(clone.runs()[new], clone)
    assert clone.runs()[new].data.tags["stage.finetune"] == "cached"
    client = clone.client()
    assert len(client.get_metric_history(new, "finetune/loss")) > 3
    assert client.list_artifacts(new, "adapter")


def test_own_csv_needs_only_params(clone, first_run):
    vocabulary = {"wild and tame animals": ANIMALS, "works of magic": MAGIC}
    write_rows(clone.folder / "mine.csv", "tweet", "class", vocabulary)
    known = set(clone.runs())
    changes = ["data.train=mine.csv", "data.text_column=tweet", "data.label_column=class"]
    process = clone.dvc("exp", "run", *(part for c in changes for part in ("-S", c)))
    assert ran(process) == ["validate", "finetune", "evaluate", "export"]
    metrics = clone.metrics("validate")
    assert metrics["rows"] == 240
    assert metrics["test_rows"] == pytest.approx(24, abs=2)
    (new,) = set(clone.runs()) - known
    assert_complete(clone.runs()[new], clone)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("data.label_column=nothing", ["nothing", "label"]),
        ("finetune.target=everything", ["finetune.target", "everything"]),
        ("finetune.method=full", ["finetune.method", "full"]),
    ],
)
def test_invalid_params_fail_with_one_line(clone, first_run, change, parts):
    before = clone.adapter_digest()
    process = clone.dvc("exp", "run", "-S", change)
    assert process.returncode != 0
    assert "exited with 2" in process.stderr
    assert "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert any(all(part in line for part in parts) for line in errors)
    clone.git("checkout", "--", "params.yaml")
    clone.dvc("checkout")
    assert clone.adapter_digest() == before
