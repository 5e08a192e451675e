"""The real pipeline, run by DVC in a temporary clone, on a small model and a small dataset."""

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


def test_the_pipeline_runs_from_rows_to_an_exported_adapter(clone, first_run):
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


# What DVC says itself.
DVC_LINES = (
    r"Running stage '\w+':|> python -m stages\.\w+|(Generating|Updating) lock file 'dvc.lock'"
    r"|To track the changes with git, run:|\tgit add .*|To enable auto staging, run:"
    r"|\tdvc config core.autostage true|Use `dvc push` .*"
)


def test_the_log_tells_the_story_and_nothing_else(clone, first_run):
    for line in filter(None, first_run.stdout.splitlines()):
        assert re.fullmatch(rf"{DVC_LINES}|({'|'.join(STAGES)}|record): .+|  .*", line), line
    for line in first_run.stderr.splitlines():  # no bar, no dict, no warning of a library
        assert re.fullmatch(r"finetune: training: \d+ of 24 steps, .+ (left|took .+)", line), line
    assert "\r" not in first_run.stdout + first_run.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_says_why_it_runs_and_what_came_of_it(clone, first_run, stage):
    said = [line for line in first_run.stdout.splitlines() if line.startswith(f"{stage}: ")]
    assert said[0] == f"{stage}: first run"
    assert len(said) >= 3
    assert re.search(r"; [\d.]+ s$", said[-1])


def test_a_skipped_stage_is_told(clone, first_run):
    again = clone.dvc("repro", "validate", "convert")
    for stage in ("validate", "convert"):
        assert f"Stage '{stage}' didn't change, skipping" in again.stdout


def test_the_first_run_is_one_complete_row(clone, first_run):
    client = clone.client()
    (run,) = clone.runs().values()
    assert_complete(run, clone)
    assert len(client.get_metric_history(run.info.run_id, "finetune/loss")) > 3
    folders = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert folders >= {"adapter", "export", "reports"}
    assert {item.path for item in client.list_artifacts(run.info.run_id, "reports")} == {
        f"reports/{stage}" for stage in STAGES
    }


def test_the_run_names_its_datasets_by_the_digests_of_dvc(clone, first_run):
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


def test_a_second_run_does_nothing(clone, first_run):
    again = clone.dvc("repro")
    assert ran(again) == []
    assert "up to date" in again.stdout
    assert len(clone.runs()) == 1


def test_nothing_but_results_is_left_in_the_tree(clone, first_run):
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    assert all(name == "dvc.lock" or name.startswith("reports/") for name in changed), changed


def test_the_same_seed_gives_the_same_bytes(clone, first_run):
    before, metrics = clone.adapter_digest(), clone.metrics("finetune")
    forced = clone.dvc("repro", "--force", "--single-item", "finetune")
    assert ran(forced) == ["finetune"]
    assert "finetune: runs again: it was asked to" in forced.stdout
    assert clone.adapter_digest() == before
    timed = {"seconds", "tokens_per_second", "samples_per_second"}
    timed |= {"peak_memory_gib", "estimated_memory_gib"}  # libraries take what they take
    again = clone.metrics("finetune")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in metrics.items() if k not in timed
    }


def test_auto_learns_what_the_same_numbers_learn(clone, first_run, monkeypatch, tmp_path):
    from gptj8.memory import fitting
    from stages import finetune

    def train(**changes):
        clone.edit_params(finetune=changes, tracking={"uri": None})
        finetune.main()
        found = clone.metrics("finetune")
        sizes = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
        return sizes, clone.adapter_digest()

    def room_for_five(estimator, params, memory, choose=fitting.choose_fit):
        assert memory > estimator.training(12).total  # of this machine, which is not so small
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
        assert train(**other)[1] != chosen  # rounding, if nothing else
    finally:
        clone.git("checkout", "--", "params.yaml")
        for number, folder in enumerate(results):  # no stage of DVC made what is there now
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / str(number), folder)


def test_a_gate_that_fails_leaves_no_registered_version(clone, first_run):
    client = clone.client()
    name = ["-S", "tracking.registered_model_name=animals"]
    refused = clone.dvc("exp", "run", *name, "-S", "evaluate.require=['tuned/accuracy > 2']")
    assert refused.returncode != 0
    assert [s for s in STAGES if f"Running stage '{s}'" in refused.stdout] == ["export"]
    reason = "evaluate.require is ['tuned/accuracy > 2'] (was [])"
    assert f"export: runs because {reason}" in refused.stdout
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "tuned/accuracy > 2 is not met" in errors[0] and "misses by" in errors[0]
    assert "exited with 2" in refused.stderr
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


def test_experiments_rerun_what_changed_and_are_complete_rows(clone, first_run):
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


def test_ones_own_csv_needs_params_only(clone, first_run):
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
def test_bad_params_stop_the_stage_with_one_line(clone, first_run, change, parts):
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
