"""A project whose stages run in seconds, for fault injection and comparison of outputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from tests.helpers.paths import ROOT
from tests.helpers.project_clone import ANIMALS, MAGIC, STAGES, hear_interrupts, write_rows

TIMING_KEYS = {
    "seconds",
    "tokens_per_second",
    "samples_per_second",
    "rows_per_second",
    "peak_memory_gib",
    "memory_gib",
    "estimated_memory_gib",
}
"""Keys of metrics and columns of curves that differ between any two runs."""
_OUTPUTS = ("artifacts", "reports")
_WITH_TIMINGS = ("README.md", "metrics.json", "manifest.json")
"""Files of the export that contain such metrics, or digests of files that do."""


def build_shim(folder: Path) -> Path:
    """Compile the library that injects faults."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


class StageProject:
    """A folder in which the stages run as DVC would run them.

    Args:
        folder: Folder to create.
        model: Directory of a small model with its tokenizer.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        shutil.copytree(model, folder / "models" / "tiny")
        write_rows(folder / "rows.csv", "text", "label", {"animals": ANIMALS, "magic": MAGIC})
        content = YAML().load((ROOT / "params.yaml").read_text())
        content["data"].update({"train": "rows.csv", "max_length": 48})
        content["model"].update({"path": "models/tiny", "dtype": "float32"})
        content["finetune"].update(
            {"num_train_epochs": 1, "logging_steps": 2, "eval_steps": 10, "lora_dropout": 0.1}
        )
        # A checkpoint after each step, so that faults can hit as many writes as possible.
        content["finetune"]["save_minutes"] = 0
        content["evaluate"].update({"bootstrap_resamples": 100, "max_generated_rows": 4})
        content["tracking"]["uri"] = None
        with open(folder / "params.yaml", "w") as stream:
            YAML().dump(content, stream)

    def start(
        self, stage: str, *, prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Start a stage in its own process group.

        Args:
            stage: Name of the stage.
            prefix: Command that executes the stage's command line, if any.
            environment: Additional environment variables.
        """
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", f"stages.{stage}"],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )

    def run(
        self, stage: str, *, prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a stage until it exits with any code; see `start`."""
        process = self.start(stage, prefix=prefix, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_all(self) -> None:
        """Run all stages; each must succeed."""
        for stage in STAGES:
            process = self.run(stage)
            assert process.returncode == 0, f"{stage}: {process.stdout}{process.stderr}"

    def outcome(self) -> dict[str, str]:
        """Return the digest of every output by path, without timings."""
        return outcome_of(self.folder)

    def leftovers(self) -> list[str]:
        """Return temporary files that a killed process left in the output folders."""
        paths = [p for top in _OUTPUTS for p in (self.folder / top).rglob("*")]
        return [str(p) for p in paths if _is_leftover(p.relative_to(self.folder))]

    def copy(self, folder: Path) -> StageProject:
        """Return a copy of the project with all its outputs."""
        twin = StageProject.__new__(StageProject)
        twin.folder = folder
        shutil.copytree(self.folder, folder)
        return twin


def outcome_of(folder: Path) -> dict[str, str]:
    """Return the digest of every output of a project by path, without timings."""
    found = {}
    for top in _OUTPUTS:
        for file in sorted((folder / top).rglob("*")):
            path = file.relative_to(folder)
            if file.is_file() and not _is_leftover(path) and (digest := _digest(file)):
                found[path.as_posix()] = digest
    return found


def _is_leftover(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _digest(file: Path) -> str | None:
    if file.parent.name == "export" and file.name in _WITH_TIMINGS:
        return None
    if file.name == "metrics.json":
        return json.dumps(_without_timings(json.loads(file.read_text())), sort_keys=True)
    if file.suffix == ".csv" and file.parent.name == "finetune":
        table = pd.read_csv(file)
        return table.drop(columns=[c for c in table if c in TIMING_KEYS]).to_csv()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _without_timings(metrics: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _without_timings(value) if isinstance(value, dict) else value
        for key, value in metrics.items()
        if key.rpartition("/")[2] not in TIMING_KEYS
    }
