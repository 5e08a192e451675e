"""Where the user's project is, also from inside a copy that DVC makes for an experiment."""

from __future__ import annotations

from pathlib import Path


def project_root() -> Path:
    """Return the folder that holds dvc.yaml: the user's own one, also from inside a DVC experiment.

     `dvc exp run --queue` and `--temp` work in a copy under .dvc/tmp/exps, which is removed after
    the experiment. What must outlive it (the MLflow database, digests) belongs to the original.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (
            folder.name == "exps"
            and folder.parent.name == "tmp"
            and folder.parents[1].name == ".dvc"
        ):
            return folder.parents[2]
    return here


def state_folder() -> Path:
    """Return where the project keeps what is of this machine alone and no output of DVC."""
    return project_root() / ".gptj8"
