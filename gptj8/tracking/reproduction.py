"""Reproduce a recorded run from its commit and compare the adapter byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, sha256_file
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import path_of_this_python
from gptj8.runtime.project import ADAPTER, project_root, state_folder
from gptj8.tracking.checkout import check_out, provide_inputs, remove, share_kernels
from gptj8.tracking.lineage import git, libraries

_RERUN_STAGES = ("validate", "convert", "finetune")


class Reproduction(NamedTuple):
    """Result of `reproduce`.

    Attributes:
        differing: files of the adapter that differ from the recorded ones; empty if none do.
        folder: the checkout; removed if nothing differs.
    """

    differing: list[str]
    folder: Path


def reproduce(run: Any, client: MlflowClient) -> Reproduction:
    """Check out a run's commit and changes, rerun its stages and compare the adapter.

    The stages validate, convert and finetune run without DVC's cache. Their inputs are not made
    again; see `gptj8.tracking.checkout.provide_inputs`.

    Raises:
        UserError: if the commit, an input or the recorded adapter is missing, or a stage fails.
    """
    tags, run_id = run.data.tags, run.info.run_id
    commit = tags.get("mlflow.source.git.commit")
    if not commit or "digest.adapter" not in tags:
        raise UserError(
            f"run {run_id} has no recorded commit or no recorded adapter, so it cannot be "
            "reproduced"
        )
    root = project_root()
    if git("cat-file", "-e", f"{commit}^{{commit}}", folder=root) is None:
        raise UserError(
            f"run {run_id} needs commit {commit}, which is not in this repository; "
            "run git fetch first"
        )
    folder = state_folder() / "reproduce" / run_id[:8]
    project = check_out(folder, commit)
    evidence = _download(client, run_id, "lineage", project)
    for line in _other_libraries(evidence):
        print(f"warning: {line}", file=sys.stderr)
    patch = recorded_patch(tags, evidence)
    if patch is not None and git("apply", "--binary", str(patch), folder=folder) is None:
        raise UserError(f"the recorded changes of run {run_id} do not apply to commit {commit}")
    environment = _environment()
    share_kernels(project)
    provide_inputs(project, tags, environment)
    for stage in _RERUN_STAGES:
        # Each stage alone: DVC would run the recipes that made the inputs, too.
        _dvc(project, environment, "repro", "--force", "--single-item", stage)
    if dvc_digest(project / ADAPTER) == tags["digest.adapter"]:
        remove(folder)
        return Reproduction([], folder)
    recorded = _digests(_download(client, run_id, "adapter", project))
    made = _digests(project / ADAPTER)
    differing = [n for n in sorted(recorded | made) if recorded.get(n) != made.get(n)]
    return Reproduction(differing, project)


def recorded_patch(tags: Mapping[str, str], evidence: Path) -> Path | None:
    """Return the changes that a run was made with, or None if there were none.

    A run that was repeated after its changes were committed still has their file, because MLflow
    removes no artifacts.

    Args:
        tags: tags of the run.
        evidence: downloaded folder `lineage` of the run.
    """
    patch = evidence / "changes.diff"
    return patch if patch.is_file() and tags.get("git.dirty") != "false" else None


def _environment() -> dict[str, str]:
    """Return an environment that uses this Python and a tracking database in the checkout."""
    own = {"PATH": path_of_this_python(), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    dropped = {"DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_ROOT", "PYTHONPATH"}
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **own}


def _dvc(folder: Path, environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments]
    if subprocess.run(command, cwd=folder, env=environment).returncode != 0:
        raise UserError(
            f"dvc {' '.join(arguments)} failed in {folder} (see the error above); the checkout was "
            "not removed"
        )


def _download(client: MlflowClient, run_id: str, name: str, folder: Path) -> Path:
    target = folder / ".gptj8" / "recorded"
    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run_id, name, str(target)))
    except (MlflowException, OSError) as error:
        reason = one_line(error)
        raise UserError(f"{name} of run {run_id} cannot be read: {reason}") from None


def _other_libraries(evidence: Path) -> list[str]:
    file = evidence / "requirements.txt"
    if not file.is_file():
        return []
    then = dict(line.split("==", 1) for line in file.read_text(encoding="utf-8").splitlines())
    now = dict(line.split("==", 1) for line in libraries().splitlines())
    return [
        f"{name} was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _digests(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): sha256_file(f) for f in list_files(folder)}
