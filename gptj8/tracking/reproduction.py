"""A recorded run done again from its commit, and its adapter compared byte for byte."""

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
from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, sha256_file
from gptj8.runtime.process import path_of_this_python
from gptj8.runtime.project import project_root, state_folder
from gptj8.tracking.lineage import git, libraries

_ADAPTER = Path("artifacts", "adapter")
_DONE_AGAIN = ("validate", "convert", "finetune")


class Reproduction(NamedTuple):
    """What came out.

    Attributes:
        differing: files of the adapter that are not what the run recorded; empty if all are.
        folder: the checkout, where it was kept.
    """

    differing: list[str]
    folder: Path


def reproduce(run: Any, client: MlflowClient) -> Reproduction:
    """Check a run's commit and changes out, validate, convert and train again without any cache,
    and compare the adapter with the recorded one.

    Inputs that git and DVC do not make are taken from this workspace, if they are still the same.

    Raises:
        UserError: if the commit, an input or the recorded adapter is missing, or a stage fails.
    """
    tags, run_id = run.data.tags, run.info.run_id
    commit = tags.get("mlflow.source.git.commit")
    if not commit or "digest.adapter" not in tags:
        raise UserError(f"run {run_id} has recorded no commit or no adapter to compare with")
    root = project_root()
    if git("cat-file", "-e", f"{commit}^{{commit}}", folder=root) is None:
        raise UserError(
            f"run {run_id} is of commit {commit}, which is not here; git fetch it first"
        )
    folder = state_folder() / "reproduce" / run_id[:8]
    _check_out(root, folder, commit)
    evidence = _download(client, run_id, "lineage", folder)
    for line in _other_libraries(evidence):
        print(f"warning: {line}", file=sys.stderr)
    patch = evidence / "changes.diff"
    if patch.is_file() and git("apply", "--binary", str(patch), folder=folder) is None:
        raise UserError(f"the recorded changes of run {run_id} do not apply to {commit}")
    _share_what_git_does_not_know(root, folder, tags)
    environment = _environment(folder)
    # Recipes may come from the cache: the digests of what they make were compared.
    _dvc(folder, environment, "repro", "convert", "validate")
    for stage in _DONE_AGAIN:
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
        raise UserError(f"git could not check {commit} out into {folder}")
    settings = folder / ".dvc" / "config.local"
    cache = _cache_folder(root)
    settings.write_text(f"[cache]\n    dir = {cache}\n", encoding="utf-8")


def _cache_folder(root: Path) -> str:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return str(repo.cache.repo.path)


def _share_what_git_does_not_know(root: Path, folder: Path, tags: dict[str, str]) -> None:
    """Link inputs into the checkout, and copy kernels that were compiled from the same source."""
    source = Path("gptj8", "kernels", "cpu_kernels.c")
    if (folder / source).is_file() and sha256_file(folder / source) == sha256_file(root / source):
        for library in (root / source.parent).glob("_cpu_kernels*.so"):
            shutil.copy2(library, folder / source.parent)
    for key, value in load_params(folder / "params.yaml").inputs.items():
        here, there = root / value, folder / value
        if there.exists() or _is_made(there, folder):
            continue
        if not here.exists():
            raise UserError(
                f"{key} = {value} is not here any more, and the run cannot be done again"
            )
        expected = tags.get(f"digest.{key}")
        if expected and dvc_digest(here) != expected:
            raise UserError(f"{key} = {value} is not what it was in this run ({expected} then)")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(here.resolve())


def _is_made(path: Path, root: Path) -> bool:
    """Whether a recipe makes it, or DVC has it in its cache."""
    from gptj8.dataset.inputs import is_made_by_a_recipe

    return path.with_name(f"{path.name}.dvc").is_file() or is_made_by_a_recipe(path, root)


def _environment(folder: Path) -> dict[str, str]:
    """The stages are to be this Python's, and to leave the recorded row alone."""
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
            f"dvc {' '.join(arguments)} failed in {folder}, for the reason shown above; the "
            "checkout is still there"
        )


def _download(client: MlflowClient, run_id: str, name: str, folder: Path) -> Path:
    target = folder / ".gptj8" / "recorded"
    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run_id, name, str(target)))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
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
