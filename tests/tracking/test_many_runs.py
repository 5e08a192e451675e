"""Thirty experiments in a row: what each adds to the disk, and what recording it costs.

The stages write what they write after a training, without one; `benchmarks.experiments` measures
real trainings through DVC.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

from gptj8.runtime.files import write_json
from gptj8.runtime.project import STAGES
from gptj8.tracking.stage import stage_run
from tests.helpers.tracked_project import params, report, runs

EXPERIMENTS, POINTS = 30, 40
WEIGHTS = 1_000_000  # bytes


def experiment(seed: int) -> None:
    """Record the five stages of one experiment, whose adapter differs from all others."""
    shutil.rmtree("artifacts", ignore_errors=True)
    for folder in ("adapter", "export", "base-8bit"):
        Path("artifacts", folder).mkdir(parents=True)
    weights = os.urandom(WEIGHTS)
    for stage in STAGES:
        with stage_run(stage, params(seed=seed)) as run:
            if stage == "finetune":
                for step in range(1, POINTS + 1):
                    run.log_metrics({"loss": seed + 1 / step, "grad_norm": 1.0}, step)
                Path("artifacts/adapter/adapter_model.safetensors").write_bytes(weights)
            if stage == "export":
                Path("artifacts/export/adapter_model.safetensors").write_bytes(weights)
                Path("artifacts/export/README.md").write_text("# A card\n")
                write_json("artifacts/base-8bit/manifest.json", {})
            report(stage, **{f"metric{n}": float(n) for n in range(25)})


def size_of(*paths: str) -> int:
    files = [f for p in map(Path, paths) for f in ([p] if p.is_file() else p.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.slow
@pytest.mark.usefixtures("recorded_inline")
def test_thirty_experiments_in_a_row_stay_flat(project, capsys):
    seconds, database, artifacts, state = [], [], [], []
    for seed in range(EXPERIMENTS):
        before = size_of("mlflow.db"), size_of("mlartifacts")
        begun = time.process_time()  # this process records as well
        experiment(seed)
        seconds.append(time.process_time() - begun)
        database.append(size_of("mlflow.db") - before[0])
        artifacts.append(size_of("mlartifacts") - before[1])
        shutil.rmtree(".gptj8/journal")  # what the recorder process removes after sending
        state.append(size_of(".gptj8"))
    third = EXPERIMENTS // 3

    def ends(values: list[float]) -> tuple[float, float]:
        return statistics.median(values[:third]), statistics.median(values[-third:])

    with capsys.disabled():
        print(f"\nseconds of recording {ends(seconds)}, bytes: mlflow.db {ends(database)}, "
              f"mlartifacts {ends(artifacts)}, .gptj8 {ends(state)}")  # fmt: skip
    client, rows = runs()
    assert len(rows) == EXPERIMENTS
    assert len(client.search_logged_models([rows[0].info.experiment_id])) == EXPERIMENTS
    assert len(list(Path("mlartifacts").rglob("adapter_model.safetensors"))) == EXPERIMENTS
    assert max(artifacts) < 1.1 * WEIGHTS  # the adapter once, and little else
    first, last = ends(database)
    assert last < 1.2 * first
    first, last = ends(seconds)
    assert last < 1.5 * first
    first, last = ends(state)
    assert last < 1.2 * first + 10_000
