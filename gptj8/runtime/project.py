"""Locate the user's project and the outputs of its stages, also inside a DVC experiment's copy."""

from __future__ import annotations

from pathlib import Path

STAGES = ("validate", "convert", "finetune", "evaluate", "export")
"""The stages that write metrics, in pipeline order."""
DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
EXPORT = Path("artifacts/export")
REPORTS = Path("reports")
"""The outputs of the stages, as declared in dvc.yaml, relative to the project's folder."""


def copied_project(path: Path) -> Path | None:
    """Return the original project if a path is inside a copy made by DVC, else None.

    `dvc exp run --queue` and `--temp` work in a copy under .dvc/tmp/exps, which is removed after
    the experiment.

    Args:
        path: an absolute path.
    """
    for folder in (path, *path.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return None


def project_root() -> Path:
    """Return the folder with dvc.yaml. Inside a DVC experiment's copy, return the original folder.

    Files that must outlive an experiment (the MLflow database, digests) belong in the original.
    """
    here = Path.cwd().resolve()
    return copied_project(here) or here


def state_folder() -> Path:
    """Return the folder for machine-specific state, which DVC does not track."""
    return project_root() / ".gptj8"
