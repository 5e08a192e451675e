"""Identify the experiment of a process: the key of its MLflow run, its name and its server.

An experiment is identified by what makes its results: the resolved params, the contents of the
inputs that they name, the code that DVC watches and the versions of libraries
(`gptj8.tracking.provenance`). Inputs and code are represented by the digests that DVC keeps in
dvc.lock. All but the libraries is therefore known from a commit without the data
(`gptj8.tracking.lookup.recipe_at`), and has a digest of its own, the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gptj8.params.sections import Params, resolved
from gptj8.runtime.dvc_digests import dvc_digest, has_content
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import write_json
from gptj8.runtime.locks import locked
from gptj8.runtime.project import project_root, state_folder
from gptj8.tracking.provenance import code_digests, library_versions

LIBRARIES_TAG = "gptj8.libraries"
"""The versions that are part of the key, as `name==version` separated by spaces."""
_SQLITE = "sqlite:///"
_COPIES = Path(".dvc", "tmp", "exps")


def tracking_uri(params: Params) -> str:
    """Return MLFLOW_TRACKING_URI or `tracking.uri`, with a relative SQLite path made absolute.

    Relative paths start at the project root. Inside `dvc exp run --queue` they would otherwise
    point into a copy of the project that DVC removes afterwards.

    Raises:
        UserError: if neither is set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    if uri is None:
        raise UserError(
            "tracking.uri is null: runs are not recorded; set it to the URI of an MLflow server or "
            "database"
        )
    if uri.startswith(_SQLITE) and not uri.startswith(_SQLITE + "/"):
        return f"{_SQLITE}{project_root() / uri.removeprefix(_SQLITE)}"
    return uri


def is_recorded(params: Params) -> bool:
    """Whether the params or the environment name a tracking server or database."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri)


def without_password(uri: str) -> str:
    """Return a URI without its user and password, so that it can be logged."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def artifact_location(uri: str) -> str | None:
    """Return the artifact location for a local database, or None if the server chooses it."""
    return (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None


def input_digests(params: Params) -> dict[str, str] | None:
    """Return params key -> DVC's digest for every input, or None if an input is missing.

    An empty file or folder counts as missing: `dvc checkout` creates one for a recipe that has not
    run yet.
    """
    root = project_root()
    paths = {key: Path(value) for key, value in params.inputs.items()}
    if not all(path.exists() and has_content(path) for path in paths.values()):
        return None
    with _known_digests(root / ".dvc" / "tmp" / "gptj8" / "digests.json") as known:
        return {key: dvc_digest(path, known) for key, path in paths.items()}


class Identity(NamedTuple):
    """What identifies an experiment.

    Attributes:
        key: digest of params, inputs, code and libraries; an MLflow run has one key.
        recipe: the same without the libraries.
        tags: the parts, as tags of the run.
    """

    key: str
    recipe: str
    tags: dict[str, str]


def identify(params: Params) -> Identity | None:
    """Return what identifies the experiment in the working folder; None if an input is missing."""
    inputs = input_digests(params)
    if inputs is None:
        return None
    code, libraries = code_digests(), library_versions()
    recipe = recipe_digest(resolved(params), inputs, code)
    tags = {f"digest.{name}": digest for name, digest in inputs.items()}
    tags["digest.code"] = _digest(code)
    tags[LIBRARIES_TAG] = " ".join(f"{name}=={version}" for name, version in libraries.items())
    return Identity(_digest({"recipe": recipe, "libraries": libraries}), recipe, tags)


def recipe_digest(
    params: Mapping[str, Any], inputs: Mapping[str, str], code: Mapping[str, str]
) -> str:
    """Return the digest of an experiment without its libraries.

    Args:
        params: result of `gptj8.params.sections.resolved`.
        inputs: result of `input_digests`.
        code: result of `gptj8.tracking.provenance.code_digests`.
    """
    return _digest({"params": params, "inputs": dict(inputs), "code": dict(code)})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def workspace_id() -> str:
    """Return a random name of this clone of the project; a copied or moved folder gets a new one.

    The copies that DVC makes for experiments have the name of the original.
    """
    file, here = state_folder() / "workspace.json", str(project_root())
    with locked(file.with_suffix(".lock")):
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["path"] == here:
                return str(known["id"])
        except (OSError, ValueError, KeyError, TypeError):  # not written yet, or damaged
            pass
        known = {"id": uuid.uuid4().hex, "path": here}
        write_json(file, known)
        return known["id"]


def experiment_name(params: Params) -> str:
    """Return DVC's name of the experiment; in the workspace, a name made of dataset and method."""
    name = os.environ.get("DVC_EXP_NAME")
    if name:
        return name
    data, method = Path(params.data.train), params.finetune.method
    dataset = data.parent.name if data.name in {"splits", "data"} else data.stem
    return f"{dataset}-{method}-r{params.finetune.r}" if method == "lora" else f"{dataset}-{method}"


def sweep_name() -> str | None:
    """Return a name shared by the experiments of one `dvc exp run --queue`; None outside a queue.

    DVC has no name for a sweep, so experiments are grouped by baseline and, if given, `--name`.
    """
    folder, copies = Path.cwd().resolve(), project_root() / _COPIES
    if copies not in folder.parents or folder.relative_to(copies).parts[0] == "standalone":
        return None
    baseline = os.environ.get("DVC_EXP_BASELINE_REV", "")[:7]
    numbered = re.fullmatch(r"(.+)-\d+", os.environ.get("DVC_EXP_NAME", ""))
    return f"{numbered[1]} from {baseline}" if numbered else f"queue from {baseline}"


def key_of(params: Params) -> str | None:
    """Return the key of the experiment in the working folder, or None if an input is missing."""
    identity = identify(params)
    return None if identity is None else identity.key


@contextmanager
def _known_digests(file: Path) -> Iterator[dict[str, str]]:
    """Yield a cache of digests by path, size, time and inode, and save additions.

    With the cache, large inputs are hashed once and not by every stage. The lock is needed because
    queued experiments run concurrently.
    """
    with locked(file.with_suffix(".lock")):
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a lost cache only costs time
            known = {}
        before = len(known)
        yield known
        if len(known) != before:
            write_json(file, known)
