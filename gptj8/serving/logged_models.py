"""MLflow 3's logged model of an export: an entry on the Models page, linked to its run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.runtime.files import sha256_file
from gptj8.runtime.manifest import MANIFEST
from gptj8.runtime.version import __version__

DIGEST_TAG = "gptj8.export"
"""Tag of logged models and model versions; `export_digest`."""
_NOT_HASHED = ("README.md", "metrics.json")  # contain times and memory, which differ between runs
_NOT_IN_A_NAME = r"[/:.%\"']"  # of a logged model


def export_digest(base: Path, export: Path) -> str:
    """Return a digest of everything that determines the answers of an export."""
    files = [*export.iterdir(), base / MANIFEST]
    parts = [f"gptj8 {__version__}"]
    parts += [
        f"{file.name} {sha256_file(file)}"
        for file in sorted(files)
        if file.is_file() and file.name not in _NOT_HASHED
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def logged_model_of(
    client: Any, run_id: str, digest: str, params: Mapping[str, str] | None = None
) -> Any:
    """Return the logged model of a run's export; create it if there is none.

    Args:
        client: an mlflow.MlflowClient.
        run_id: id of the run that exported the model.
        digest: `export_digest` of the export.
        params: params that the model shows.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    known = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for model in known:
        if model.tags.get(DIGEST_TAG) == digest:
            return model
    model = client.create_logged_model(
        experiment,
        re.sub(_NOT_IN_A_NAME, "-", run.info.run_name or "export"),
        run_id,
        {DIGEST_TAG: digest},
        dict(params or {}),
        "gptj8",
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return client.finalize_logged_model(model.model_id, "READY")
