"""A recorded commit checked out beside the workspace, with the inputs that its run read.

The checkout is a git worktree in `.gptj8/reproduce`, so the workspace stays as it is. A project may
lie in a subfolder of its repository; it then does so in the checkout too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gptj8.params.sections import load_params
from gptj8.runtime.dvc_digests import cache_folder, dvc_digest, has_content, restore
from gptj8.runtime.errors import UserError
from gptj8.runtime.project import project_root
from gptj8.tracking.lineage import git

_KERNELS = Path("gptj8", "kernels", "c")


def check_out(folder: Path, commit: str) -> Path:
    """Check out a commit and return the project's folder in it.

    DVC there uses the workspace's cache, in the same layout, and its remotes.

    Args:
        folder: folder of the worktree; replaced if it exists.
        commit: a commit of the workspace's repository.

    Raises:
        UserError: if git fails, or the commit has no DVC project at this place.
    """
    root = project_root()
    if folder.exists():
        remove(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if git("worktree", "add", "--detach", "--force", str(folder), commit, folder=root) is None:
        raise UserError(f"git could not check out {commit} in {folder}")
    project = folder / (git("rev-parse", "--show-prefix", folder=root) or "")
    settings = _dvc_folder(project, folder)
    if settings is None or not (project / "dvc.yaml").is_file():
        remove(folder)
        raise UserError(
            f"commit {commit} has no dvc.yaml in this place, or no .dvc above it; run gptj8 "
            "reproduce where the project was at that commit"
        )
    _write_settings(settings / "config.local", root)
    return project


def remove(folder: Path) -> None:
    """Remove a checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    git("worktree", "prune", folder=project_root())


def share_kernels(project: Path) -> None:
    """Copy the compiled kernels of the workspace, if they are made from the same source."""
    source = project_root() / _KERNELS
    if not (project / _KERNELS).is_dir() or not source.is_dir():
        return
    if dvc_digest(project / _KERNELS) == dvc_digest(source):
        for library in source.parent.glob("_cpu_kernels*.so"):
            shutil.copy2(library, (project / _KERNELS).parent)


def provide_inputs(project: Path, tags: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Put the inputs that a run read into its checkout, without running a recipe.

    An input is in git, or it is linked from the workspace if it has not changed there since, or it
    comes from DVC's cache or remote by the digest that the run recorded. It does not matter whether
    a recipe made it, `dvc add` tracks it, or neither.

    Args:
        project: result of `check_out`, with the recorded changes applied.
        tags: tags of the run.
        environment: environment for DVC.

    Raises:
        UserError: if an input is gone or has changed.
    """
    root = project_root()
    cache = cache_folder(root)
    for key, value in load_params(project / "params.yaml").inputs.items():
        here, there, digest = root / value, project / value, tags.get(f"digest.{key}")
        if _is_there(there):
            if digest and dvc_digest(there) != digest:
                raise UserError(
                    f"{key} = {value} in the recorded commit is not what the run read (digest "
                    f"{digest}); it was changed after the run began"
                )
            continue
        if there.is_dir():
            shutil.rmtree(there)
        there.parent.mkdir(parents=True, exist_ok=True)
        if _is_there(here) and (not digest or dvc_digest(here) == digest):
            there.symlink_to(here.resolve())
            continue
        if digest and restore(digest, there, cache):
            continue
        if digest and _fetch(project, value, environment) and restore(digest, there, cache):
            continue
        raise UserError(_lost(key, value, digest, _is_there(here)))


def _write_settings(file: Path, root: Path) -> None:
    """Write the workspace's cache and remotes as settings of a checkout.

    Relative paths in .dvc/config start at another folder there, and git does not have the
    workspace's config.local.
    """
    from configobj import ConfigObj
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        merged = repo.config.load_config_to_level()
    settings = {
        "cache": {"dir": str(cache_folder(root))},
        **{f'remote "{name}"': remote for name, remote in merged.get("remote", {}).items()},
    }
    if default := merged.get("core", {}).get("remote"):
        settings["core"] = {"remote": default}
    # DVC itself cannot write a path with umlauts.
    with open(file, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        ConfigObj(settings, encoding="utf-8").write(stream)  # it may have a password


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and has_content(path))


def _lost(key: str, value: str, digest: str | None, is_changed: bool) -> str:
    what = "has changed since this run" if is_changed else "no longer exists"
    return (
        f"{key} = {value} {what}, and DVC's cache and remote do not have the content that the run "
        f"read (digest {digest or 'not recorded'}); put it back, or dvc fetch it, and try again"
    )


def _fetch(project: Path, value: str, environment: Mapping[str, str]) -> bool:
    """Ask DVC's remote for an input; return whether DVC knows the input and the remote answers."""
    command = [sys.executable, "-m", "dvc", "fetch", "--quiet", value]
    process = subprocess.run(command, cwd=project, env=dict(environment), capture_output=True)
    return process.returncode == 0


def _dvc_folder(project: Path, top: Path) -> Path | None:
    """Return the `.dvc` of a project, which is at or above it and inside the checkout."""
    for folder in (project, *project.parents):
        if (folder / ".dvc").is_dir():
            return folder / ".dvc"
        if folder == top:
            return None
    return None
