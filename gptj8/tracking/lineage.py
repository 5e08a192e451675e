"""Origin of a run: commit and changes, DVC experiment, libraries, machine and command."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.params.sections import PARAMS_FILE
from gptj8.runtime.machine import cpu_name
from gptj8.tracking.description import CHANGED_CODE_TAG
from gptj8.tracking.identity import without_password
from gptj8.tracking.journal import flatten
from gptj8.tracking.page import CHANGED_TAG

# Results, which are not changes by the user: DVC writes dvc.lock, the stages write reports.
_RESULTS = (":(exclude)dvc.lock", ":(exclude)**/dvc.lock", ":(exclude)reports")
# Against settings of the user, such as diff.noprefix.
_AS_GIT_APPLY_READS_IT = ("--no-textconv", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/")
# Characters that a hydra override may contain without quotes.
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+%@?")


def lineage_tags(folder: Path) -> dict[str, str]:
    """Return the tags of a process that runs in `folder`, with MLflow's names where they exist."""
    commit = git("rev-parse", "HEAD", folder=folder)
    branch = git("rev-parse", "--abbrev-ref", "HEAD", folder=folder)
    remote = git("remote", "get-url", "origin", folder=folder)
    experiment = os.environ.get("DVC_EXP_NAME")
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "dvc exp run" if experiment else "dvc repro",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch if branch != "HEAD" else None,
        "mlflow.source.git.repoURL": without_password(remote) if remote else None,
        "git.dirty": str(bool(changes(folder))).lower() if commit else None,
        "dvc.experiment": experiment,
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV"),
        "python": platform.python_version(),
        **{f"hardware.{name}": value for name, value in hardware().items()},
        CHANGED_TAG: " ".join(_changed_params(folder) or []) if commit else None,
        CHANGED_CODE_TAG: "\n".join(_changed_code(folder)) if commit else None,
        "command": reproducing_command(folder, commit) if commit else None,
    }
    return {key: value for key, value in tags.items() if value}


def changes(folder: Path) -> str:
    """Return the changes since the commit as a patch: params and code, but not results.

    Bytes that are not UTF-8 are escaped (`surrogateescape`) and line ends are kept, so that the
    patch also applies to a Latin-1 file or one from Windows. Paths start at the repository's root.
    """
    return (
        git(
            "diff",
            "--binary",
            "--no-color",
            "--no-ext-diff",
            *_AS_GIT_APPLY_READS_IT,
            "HEAD",
            "--",
            ".",
            *_RESULTS,
            strip=False,
            folder=folder,
        )
        or ""
    )


def unknown_files(folder: Path) -> str:
    """Return the names of files that git neither tracks nor ignores, one per line."""
    names = git("ls-files", "--others", "--exclude-standard", "--", ".", *_RESULTS, folder=folder)
    return f"{names}\n" if names else ""


def reproducing_command(folder: Path, commit: str) -> str:
    """Return the shell command that reproduces the run from a clone of the repository."""
    names = ("diff", "--name-only", "--relative", "HEAD", "--", ".")
    patch = git(*names, *_RESULTS, folder=folder)
    start = f"git checkout {commit}"
    if not patch:
        return f"{start} && dvc repro"
    if patch == PARAMS_FILE:
        overrides = _changed_params(folder)
        if overrides is not None:
            options = " ".join(f"-S {shlex.quote(change)}" for change in overrides)
            return f"{start} && dvc exp run {options}"
    return f"{start} && git apply changes.diff && dvc repro"


def libraries() -> str:
    """Return the installed distributions and their versions as a requirements file."""
    found = {
        distribution.name: distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.name
    }
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def hardware() -> dict[str, str]:
    """Return `cpu`, `cores`, `memory_gib` and, if there is a GPU, `gpu`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "cpu": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "memory_gib": f"{memory:.1f}",
    }
    if shutil.which("nvidia-smi"):
        gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
        if gpus:
            found["gpu"] = "; ".join(gpus.splitlines())
    return found


def git(*arguments: str, folder: Path | None = None, strip: bool = True) -> str | None:
    """Return git's output in a folder, by default the working folder; None if git fails."""
    output = _output(["git", "-C", str(folder or Path()), *arguments])
    return output.strip() if output is not None and strip else output


def override(key: str, value: Any) -> str:
    """Return `key=value` in the syntax of `dvc exp run -S`, which is hydra's."""
    return f"{key}={_hydra(value)}"


def _hydra(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    text = str(value)
    if text and set(text) <= _PLAIN and not _reads_as_another_type(text):
        return text
    # Only backslashes before a quote are doubled.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _reads_as_another_type(text: str) -> bool:
    if text.lower() in {"null", "true", "false", "nan", "inf", "-inf"}:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _changed_params(folder: Path) -> list[str] | None:
    """Return the changes of params.yaml as overrides, or None if overrides cannot express them."""
    from ruamel.yaml import YAML, YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        before = yaml.load(git("show", f"HEAD:./{PARAMS_FILE}", strip=False, folder=folder) or "")
        after = yaml.load((folder / PARAMS_FILE).read_text(encoding="utf-8"))
    except (OSError, YAMLError):
        return None
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return None
    old, new = flatten(before, "."), flatten(after, ".")
    if old.keys() - new.keys():
        return None
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    if any("${" in str(value) for value in changed.values()):  # hydra would interpolate it
        return None
    return [override(key, value) for key, value in changed.items()] or None


def _changed_code(folder: Path) -> list[str]:
    plain = ("-c", "core.quotePath=false")  # names as they are, also with umlauts
    names = git(*plain, "diff", "--name-only", "HEAD", "--", ".", *_RESULTS, folder=folder) or ""
    return [name for name in names.splitlines() if Path(name).name != PARAMS_FILE]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # user ids in containers may have no name
        return None


def _output(command: list[str]) -> str | None:
    try:
        process = subprocess.run(command, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Bytes, because text would lose the line ends of Windows.
    return process.stdout.decode(errors="surrogateescape") if process.returncode == 0 else None
