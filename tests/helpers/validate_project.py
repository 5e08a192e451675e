"""A small project in which the stage `validate` runs as a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.labelled_rows import byte_tokenizer, pairs, write_csv
from tests.helpers.paths import ROOT


def make_project(tmp_path: Path) -> Path:
    """Return a folder with a model's tokenizer, a dataset and params.yaml."""
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    config = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    write_csv(folder / "mine.csv", pairs(40))
    write_csv(folder / "same.csv", pairs(40))
    write_params(folder)
    return folder


def write_params(folder: Path, **data: object) -> None:
    content = {"data": {"train": "mine.csv"} | data, "model": {"path": "model"}}
    content["tracking"] = {"uri": None}  # MLflow takes ten seconds to create a database
    (folder / "params.yaml").write_text(json.dumps(content))  # JSON is YAML


def run_stage(folder: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "stages.validate"]
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    own = {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
    }
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DVC_", "MLFLOW_"))
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=inherited | own,
        capture_output=True,
        text=True,
        timeout=120,
    )


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}
