"""Which experiment a process belongs to: the key that finds its MLflow run, its name, its server.

An experiment is what decides its outcome: the resolved params and the contents of what they name.
The contents are known by the digests that DVC keeps in dvc.lock, so that the key of an experiment
can be told from a commit alone (`key_at`), without its data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptj8.params.sections import Params, resolved
from gptj8.runtime.dvc_digests import dvc_digest, dvc_files
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import write_json
from gptj8.runtime.project import project_root

_SQLITE = "sqlite:///"
_COPIES = Path(".dvc", "tmp", "exps")


def tracking_uri(params: Params) -> str:
    """Return MLFLOW_TRACKING_URI or `tracking.uri`, a relative SQLite path made absolute.

    Relative paths are the project's own: inside `dvc exp run --queue` they would otherwise lie in a
    copy that DVC removes afterwards.

    Raises:
        UserError: if there is neither.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    if uri is None:
        raise UserError("tracking.uri is null: nothing is recorded; set it to where runs are kept")
    if uri.startswith(_SQLITE) and not uri.startswith(_SQLITE + "/"):
        return f"{_SQLITE}{project_root() / uri.removeprefix(_SQLITE)}"
    return uri


def is_recorded(params: Params) -> bool:
    """Whether the params, or the environment, say where runs are kept."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri)


def without_password(uri: str) -> str:
    """Return a URI that may be written down: user and password, if it has them, left out."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def artifact_location(uri: str) -> str | None:
    """Return where a local database's artifacts lie; None where the server decides."""
    return (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None


def input_digests(params: Params) -> dict[str, str] | None:
    """Return key -> DVC's digest of every input; None while one of them is not there yet.

    Empty is what `dvc checkout` makes where a recipe has made nothing yet.
    """
    root = project_root()
    paths = {key: Path(value) for key, value in params.inputs.items()}
    if not all(path.exists() and _has_content(path) for path in paths.values()):
        return None
    with _known_digests(root / ".dvc" / "tmp" / "gptj8" / "digests.json") as known:
        return {key: dvc_digest(path, known) for key, path in paths.items()}


def _has_content(path: Path) -> bool:
    return any(file.stat().st_size for file in dvc_files(path))


def experiment_key(params: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return the digest of what decides an experiment's outcome.

    Args:
        params: `gptj8.params.sections.resolved`.
        digests: of `input_digests`.
    """
    content = json.dumps({"params": params, "inputs": dict(digests)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def experiment_name(params: Params) -> str:
    """Return DVC's name of the experiment or, of the workspace, one of dataset and method."""
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    data, method = Path(params.data.train), params.finetune.method
    dataset = data.parent.name if data.name in {"splits", "data"} else data.stem
    return f"{dataset}-{method}-r{params.finetune.r}" if method == "lora" else f"{dataset}-{method}"


def sweep_name() -> str | None:
    """Return what the experiments of one `dvc exp run --queue` have in common; None elsewhere.

    DVC keeps no name for a sweep. Those of one baseline, and of one `--name` where that is given,
    belong together.
    """
    folder, copies = Path.cwd().resolve(), project_root() / _COPIES
    if copies not in folder.parents or folder.relative_to(copies).parts[0] == "standalone":
        return None
    baseline = os.environ.get("DVC_EXP_BASELINE_REV", "")[:7]
    numbered = re.fullmatch(r"(.+)-\d+", os.environ.get("DVC_EXP_NAME", ""))
    return f"{numbered[1]} from {baseline}" if numbered else f"queue from {baseline}"


def key_of(params: Params) -> str | None:
    """Return the key of the experiment in the working folder; None while an input is missing."""
    digests = input_digests(params)
    return None if digests is None else experiment_key(resolved(params), digests)


@contextmanager
def _known_digests(file: Path) -> Iterator[dict[str, str]]:
    """Yield digests by path, size, time and inode, so that gigabytes are read once and not by every
    stage; what is added is kept. Experiments of a queue may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a lost cache costs time, not correctness
            known = {}
        before = len(known)
        yield known
        if len(known) != before:
            write_json(file, known)
