"""Where the user's project is, also from inside a copy that DVC makes for an experiment, and where
its stages write."""

from __future__ import annotations

from pathlib import Path

STAGES = ("validate", "convert", "finetune", "evaluate", "export")
"""The stages that measure something, in their order."""
DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
EXPORT = Path("artifacts/export")
REPORTS = Path("reports")
"""What the stages write, as dvc.yaml declares it, relative to the project's folder."""


def copied_project(path: Path) -> Path | None:
    """Return the user's own project where a path lies in a copy of it that DVC made; else None.

    `dvc exp run --queue` and `--temp` work in a copy under .dvc/tmp/exps, which is removed after
    the experiment.

    Args:
        path: absolute.
    """
    for folder in (path, *path.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return None


def project_root() -> Path:
    """Return the folder that holds dvc.yaml: the user's own one, also from inside a DVC experiment.

    What must outlive an experiment (the MLflow database, digests) belongs to the original.
    """
    here = Path.cwd().resolve()
    return copied_project(here) or here


def state_folder() -> Path:
    """Return where the project keeps what is of this machine alone and no output of DVC."""
    return project_root() / ".gptj8"
