"""Reproduce a recorded run from its commit and compare the adapter byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gptj8.params.sections import load_params
from gptj8.runtime.dvc_digests import cache_folder, dvc_digest
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, sha256_file
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import path_of_this_python
from gptj8.runtime.project import project_root, state_folder
from gptj8.tracking.lineage import git, libraries

_ADAPTER = Path("artifacts", "adapter")
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

    The stages validate, convert and finetune run without DVC's cache. Inputs that neither git nor
    DVC provides are linked from this workspace if their contents have not changed.

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
    _check_out(root, folder, commit)
    evidence = _download(client, run_id, "lineage", folder)
    for line in _other_libraries(evidence):
        print(f"warning: {line}", file=sys.stderr)
    patch = evidence / "changes.diff"
    if patch.is_file() and git("apply", "--binary", str(patch), folder=folder) is None:
        raise UserError(f"the recorded changes of run {run_id} do not apply to commit {commit}")
    _share_untracked(root, folder, tags)
    environment = _environment(folder)
    # Recipes may come from the cache, because the digests of their outputs were compared.
    _dvc(folder, environment, "repro", "convert", "validate")
    for stage in _RERUN_STAGES:
        _dvc(folder, environment, "repro", "--force", "--single-item", stage)
    if dvc_digest(folder / _ADAPTER) == tags["digest.adapter"]:
        remove(folder)
        return Reproduction([], folder)
    recorded = _digests(_download(client, run_id, "adapter", folder))
    made = _digests(folder / _ADAPTER)
    differing = [n for n in sorted(recorded | made) if recorded.get(n) != made.get(n)]
    return Reproduction(differing, folder)


def remove(folder: Path) -> None:
    """Remove a checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    git("worktree", "prune", folder=project_root())


def _check_out(root: Path, folder: Path, commit: str) -> None:
    if folder.exists():
        remove(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if git("worktree", "add", "--detach", "--force", str(folder), commit, folder=root) is None:
        raise UserError(f"git could not check out {commit} in {folder}")
    settings = folder / ".dvc" / "config.local"
    settings.write_text(f"[cache]\n    dir = {cache_folder(root)}\n", encoding="utf-8")


def _share_untracked(root: Path, folder: Path, tags: dict[str, str]) -> None:
    """Link inputs into the checkout and copy kernels that were compiled from the same source."""
    source = Path("gptj8", "kernels", "cpu_kernels.c")
    if (folder / source).is_file() and sha256_file(folder / source) == sha256_file(root / source):
        for library in (root / source.parent).glob("_cpu_kernels*.so"):
            shutil.copy2(library, folder / source.parent)
    for key, value in load_params(folder / "params.yaml").inputs.items():
        here, there = root / value, folder / value
        if there.exists() or _is_made(there, folder):
            continue
        if not here.exists():
            raise UserError(f"{key} = {value} no longer exists, so the run cannot be reproduced")
        expected = tags.get(f"digest.{key}")
        if expected and dvc_digest(here) != expected:
            raise UserError(f"{key} = {value} has changed since this run (digest {expected} then)")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(here.resolve())


def _is_made(path: Path, root: Path) -> bool:
    """Return whether a recipe makes the path or a .dvc file describes it."""
    from gptj8.dataset.inputs import is_made_by_a_recipe

    return path.with_name(f"{path.name}.dvc").is_file() or is_made_by_a_recipe(path, root)


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment that uses this Python and a separate tracking database."""
    own = {
        "PATH": path_of_this_python(),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
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
