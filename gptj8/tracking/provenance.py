"""What makes results beside params and inputs: the code that DVC watches, and libraries.

A row in MLflow is one combination of all four (`gptj8.tracking.identity`). Without the code, an
edited training loop would write its curve into the row of the old one.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj8.runtime.dvc_digests import dvc_digest

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "ftfy",
    "jinja2",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "rensa",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)
"""Libraries whose code decides a number in a report: arithmetic and the optimizer (torch, numpy,
bitsandbytes), model and training loop (transformers, peft, accelerate), rows and tokens (pandas,
pyarrow, ftfy, rensa, jinja2, tokenizers), the baseline and the intervals (scikit-learn, scipy).
Others store, send or show results. If they counted, an upgrade of MLflow would split the rows."""

DVC_FILE = "dvc.yaml"


def library_versions() -> dict[str, str]:
    """Return the installed versions of `LIBRARIES`.

    Builds for different devices, such as 2.13.0+cpu and 2.13.0+cu130, count as one version: the
    machine is recorded, but it is no part of the experiment.
    """
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:  # the stage that imports it reports it
            continue
    return found


def code_digests(folder: Path = Path()) -> dict[str, str]:
    """Return path -> DVC's digest for the code that the stages in a project's dvc.yaml depend on.

    Nothing is read from a cache of digests: it would grow by the whole package with each copy that
    DVC makes of the project, and a megabyte is hashed in milliseconds.
    """
    from ruamel.yaml import YAML

    file, here = folder / DVC_FILE, folder.absolute()
    if not file.is_file() or not any((p / ".dvc").is_dir() for p in (here, *here.parents)):
        return {}  # not a DVC project, so nothing says which files count
    declared = YAML(typ="safe", pure=True).load(file)
    return {
        path: dvc_digest(folder / path) for path in code_paths(declared) if (folder / path).exists()
    }


def locked_code_digests(declared: Any, lock: Any) -> dict[str, str]:
    """Return the result of `code_digests` after the last run, from dvc.yaml and dvc.lock.

    Args:
        declared, lock: contents of the two files.
    """
    locked = {
        os.path.normpath(dep["path"]): dep.get("md5", "")
        for stage in lock["stages"].values()
        for dep in stage.get("deps", ())
    }
    return {path: locked[path] for path in code_paths(declared) if path in locked}


def code_paths(declared: Any) -> list[str]:
    """Return the deps that are neither inputs named by params nor outputs of a stage, sorted."""
    stages = (declared or {}).get("stages") or {}
    made = {out for stage in stages.values() for kind in _OUTPUTS for out in _paths(stage, kind)}
    deps = {dep for stage in stages.values() for dep in _paths(stage, "deps")}
    return sorted(dep for dep in deps - made if "${" not in dep)


_OUTPUTS = ("outs", "metrics", "plots")


def _paths(stage: Mapping[str, Any], kind: str) -> Iterator[str]:
    for entry in stage.get(kind) or ():
        path = entry if isinstance(entry, str) else next(iter(entry))
        yield path if "${" in path else os.path.normpath(path)
