"""A fresh clone of the project in a temporary folder, small enough to be run many times."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from tests.helpers.paths import ROOT

STAGES = ("validate", "convert", "finetune", "evaluate", "export")


def hear_interrupts() -> None:
    """Restore SIGINT in a child process: background jobs inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Clone:
    """A clone of the working tree with a small model and dataset, as in a fresh checkout."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder), cwd=folder.parent)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in listed:
            # dvc.lock records earlier runs, which a fresh checkout does not have.
            if (ROOT / name).is_file() and Path(name).name != "dvc.lock":
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

    def dvc(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run DVC with changes of the environment."""
        scripts = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": ""}
        environment |= changes
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment.pop("TRANSFORMERS_VERBOSITY", None)  # users see all its messages
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

    def client(self) -> mlflow.MlflowClient:
        """Return a client of the current database.

        MLflow keeps a database open by its URI, even if the file was replaced. Each file therefore
        gets its own path, through a link.
        """
        number = (self.folder / "mlflow.db").stat().st_ino
        link = self.folder.parent / f"database-{number}"
        if not link.is_symlink():
            link.symlink_to(self.folder)
        return mlflow.MlflowClient(f"sqlite:///{link / 'mlflow.db'}")

    def runs(self) -> dict[str, mlflow.entities.Run]:
        client = self.client()
        experiment = client.get_experiment_by_name("gptj8")
        return {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}


ANIMALS = "fox dog cat hen cow pig owl bee ant elk".split()
MAGIC = "wizard spell wand potion witch rune charm curse staff orb".split()


def write_rows(path: Path, text: str, label: str, vocabulary: dict[str, list[str]]) -> None:
    """Write 120 distinct rows per label, with words drawn from the label's vocabulary."""
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


def assert_complete(run: mlflow.entities.Run, clone: Clone, stages=STAGES) -> None:
    """Assert that an MLflow run is finished and has all params and all metrics of the stages."""
    from gptj8.tracking.journal import flatten

    assert run.info.status == "FINISHED"
    for stage in stages:
        for key, value in flatten(clone.metrics(stage), "/").items():
            assert run.data.metrics[f"{stage}/{key}"] == pytest.approx(value), key
    params = YAML(typ="safe").load((clone.folder / "params.yaml").read_text())
    params.pop("tracking")
    assert set(run.data.params) == set(flatten(params, "."))
    assert run.data.params["finetune.r"] == str(params["finetune"]["r"])
