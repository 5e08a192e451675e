"""The real pipeline, run by DVC in a temporary clone, on a small model and a small dataset."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
STAGES = ("validate", "convert", "finetune", "evaluate", "export")

# Modules that decide how a stage talks to its surroundings and not what it writes. Were they deps,
# every new param and every change of tracking would reconvert the model.
NEUTRAL = {"__init__", "_registration", "errors", "files", "params", "runtime", "tracking"}
# The estimate of memory is written beside what training measured and decides only how `auto` splits a
# batch, which depends on the memory that is free, and so on what no file tells: to estimate better is
# no reason to train again for hours.
NEUTRAL |= {"skeleton", "trace", "heap", "estimate", "machine", "calibration", "auto_batch", "stage"}
# Whatever the kernels are, conversion writes the same bytes (tests/test_kernels.py), and it never
# computes with a model: a faster kernel is no reason to convert again. Loading a model shares a
# module with conversion, and never converts.
UNUSED = {
    "convert": {"attention", "gpu_kernels", "kernels", "native", "operators"},
    "finetune": {"legacy"},
    "evaluate": {"legacy"},
    "export": {"legacy"},
}


def imports_of(file: Path) -> set[Path]:
    """Return the project's files that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = set()
    for name in names:
        if name.split(".")[0] in ("gptj8", "stages"):
            stem = ROOT / name.replace(".", "/")
            paths |= {p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()}
    return paths


def closure(file: Path) -> set[str]:
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path not in found and (path == file or path.stem not in NEUTRAL):
            found.add(path)
            waiting += imports_of(path)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.parametrize("stage", STAGES)
def test_declared_deps_are_the_import_closure(stage):
    definition = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    declared = {dep for dep in definition["deps"] if dep.startswith(("gptj8/", "stages/"))}
    unused = {f"gptj8/{name}.py" for name in UNUSED.get(stage, ())}
    needed = closure(ROOT / "stages" / f"{stage}.py") - unused
    folders = {dep for dep in declared if not dep.endswith(".py")}
    needed = {f for f in needed if not any(f.startswith(f"{folder}/") for folder in folders)}
    assert declared - folders == needed


def test_every_param_is_declared_by_some_stage():
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    declared = {name for stage in stages.values() for name in stage["params"]}
    assert set(params) - declared == {"tracking"}


class Clone:
    """A clone of the working tree, as a newcomer has it, with a small model and dataset in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder), cwd=folder.parent)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in listed:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        shutil.copytree(model, folder / "models" / "tiny")
        write_rows(folder / "rows.csv", "text", "label", {"animals": ANIMALS, "magic": MAGIC})
        self.edit_params(
            data={"train": "rows.csv", "max_length": 48},
            model={"path": "models/tiny", "dtype": "float32"},
            finetune={"num_train_epochs": 1, "logging_steps": 2, "eval_steps": 10},
            evaluate={"bootstrap_resamples": 100},
        )
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", "small setting")

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=cwd or self.folder, capture_output=True, text=True, check=True
        ).stdout

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        scripts = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": ""}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=environment
        )

    def edit_params(self, **sections: dict) -> None:
        yaml = YAML()
        content = yaml.load((self.folder / "params.yaml").read_text())
        for section, changes in sections.items():
            content[section].update(changes)
        with open(self.folder / "params.yaml", "w") as stream:
            yaml.dump(content, stream)

    def metrics(self, stage: str) -> dict:
        return json.loads((self.folder / "reports" / stage / "metrics.json").read_text())

    def adapter_digest(self) -> dict[str, str]:
        folder = self.folder / "artifacts" / "adapter"
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}

    def runs(self) -> dict[str, mlflow.entities.Run]:
        client = mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("gptj8")
        return {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}


ANIMALS = "fox dog cat hen cow pig owl bee ant elk".split()
MAGIC = "wizard spell wand potion witch rune charm curse staff orb".split()


def write_rows(path: Path, text: str, label: str, vocabulary: dict[str, list[str]]) -> None:
    """Write 120 distinct rows a label, words drawn from the label's own vocabulary."""
    generator = random.Random(0)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", text, label])
        for index in range(120):
            for name, words in vocabulary.items():
                sentence = " ".join(generator.choice(words) for _ in range(9))
                writer.writerow([index, sentence, name])


def ran(process: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the stages that DVC started."""
    assert process.returncode == 0, process.stdout + process.stderr
    return [s for s in STAGES if f"Running stage '{s}'" in process.stdout]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    return Clone(tmp_path_factory.mktemp("clone") / "project", tiny_model_dir)


@pytest.fixture(scope="module")
def first_run(clone):
    return clone.dvc("repro")


def assert_complete(run: mlflow.entities.Run, clone: Clone, stages=STAGES) -> None:
    """Every number of every stage's metrics.json is in the row, every param, and it is finished."""
    from gptj8.tracking import flatten

    assert run.info.status == "FINISHED"
    for stage in stages:
        for key, value in flatten(clone.metrics(stage), "/").items():
            assert run.data.metrics[f"{stage}/{key}"] == pytest.approx(value), key
    params = YAML(typ="safe").load((clone.folder / "params.yaml").read_text())
    params.pop("tracking")
    assert set(run.data.params) == set(flatten(params, "."))
    assert run.data.params["finetune.r"] == str(params["finetune"]["r"])


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


def test_the_first_run_is_one_complete_row(clone, first_run):
    client = mlflow.MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
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
    assert ran(clone.dvc("repro", "--force", "--single-item", "finetune")) == ["finetune"]
    assert clone.adapter_digest() == before
    timed = {"seconds", "tokens_per_second", "samples_per_second", "peak_memory_gib"}
    again = clone.metrics("finetune")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in metrics.items() if k not in timed
    }


def test_a_gate_that_fails_leaves_no_registered_version(clone, first_run):
    client = mlflow.MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
    name = ["-S", "tracking.registered_model_name=animals"]
    refused = clone.dvc("exp", "run", *name, "-S", "evaluate.require=['tuned/accuracy > 2']")
    assert refused.returncode != 0
    assert [s for s in STAGES if f"Running stage '{s}'" in refused.stdout] == ["export"]
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


@pytest.mark.slow
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
    client = mlflow.MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
    assert len(client.get_metric_history(new, "finetune/loss")) > 3
    assert client.list_artifacts(new, "adapter")


@pytest.mark.slow
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
