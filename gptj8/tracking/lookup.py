"""Find the MLflow run of a commit, a DVC experiment or a run id."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from tarfile import TarError
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gptj8.params.sections import PARAMS_FILE, Params, parse_params, resolved
from gptj8.runtime.dvc_digests import IGNORE_FILE
from gptj8.runtime.errors import UserError
from gptj8.tracking.delivery import EXPERIMENTS_TAG, connect
from gptj8.tracking.identity import (
    identify,
    is_recorded,
    recipe_digest,
    tracking_uri,
    without_password,
    workspace_id,
)
from gptj8.tracking.lineage import git
from gptj8.tracking.provenance import (
    DVC_FILE,
    code_digests,
    code_paths,
    locked_code_digests,
)
from gptj8.tracking.rows import RECIPE_TAG, find_made_row, runs_with
from gptj8.tracking.server_errors import explain, reach

_COMMIT_TAG = "mlflow.source.git.commit"


def client_of(params: Params) -> tuple[MlflowClient, str]:
    """Return a client and the id of the MLflow experiment named in the params.

    Raises:
        UserError: if the server fails or does not have the experiment.
    """
    uri, name = tracking_uri(params), params.tracking.experiment
    try:
        reach(uri)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
    except MlflowException as error:
        raise UserError(explain(uri, error)) from None
    if experiment is None:
        raise UserError(
            f"{without_password(uri)} has no experiment {name}; run `dvc repro` to record one"
        )
    return client, experiment.experiment_id


def find(what: str | None, params: Params) -> list[Any]:
    """Return the runs of a run id, a DVC experiment's name or a git revision, newest first.

    Args:
        what: run id, name or revision; None for the experiment of the current workspace.
        params: params of the workspace, which name the tracking server.

    Raises:
        UserError: if there is no such run.
    """
    client, experiment_id = client_of(params)
    if what is None:
        run = row_of_workspace(params)[1]
        if run is None:
            raise UserError(
                f"the current {PARAMS_FILE} has no run yet; run `dvc repro`, or give gptj8 find a "
                "commit, an experiment's name or a run id"
            )
        return [run]
    if re.fullmatch(r"[0-9a-f]{32}", what):
        try:
            return [client.get_run(what)]
        except MlflowException:
            raise UserError(f"{without_password(tracking_uri(params))} has no run {what}") from None
    quoted = what.replace("'", "")
    named = client.search_runs([experiment_id], f"tags.`{EXPERIMENTS_TAG}` LIKE '%{quoted}%'")
    found = [run for run in named if what in run.data.tags[EXPERIMENTS_TAG].split("\n")]
    commit = git("rev-parse", "--verify", "--quiet", f"{what}^{{commit}}") or _experiment(what)
    if not found and commit is None:
        raise UserError(f"{what} is not a known run, DVC experiment or git revision")
    if commit is not None:
        recipe = recipe_at(commit)
        if recipe is not None:  # newest first: the same commit may have run with other libraries
            found += runs_with(client, experiment_id, recipe, RECIPE_TAG)[::-1]
        found += client.search_runs([experiment_id], f"tags.`{_COMMIT_TAG}` = '{commit}'")
    if not found:
        raise UserError(f"{what} has no run in {params.tracking.experiment}")
    return list({run.info.run_id: run for run in found}.values())


def row_of_workspace(params: Params) -> tuple[bool, Any]:
    """Return whether the experiment in the working folder can be known, and its run or None.

    It cannot be known, and is not looked for, if an input is missing or nothing is recorded.

    Raises:
        UserError: if the server fails.
    """
    identity = identify(params) if is_recorded(params) else None
    if identity is None:
        return False, None
    uri = tracking_uri(params)
    try:
        client, experiment_id, _ = connect(uri, params.tracking.experiment)
        return True, find_made_row(
            client, experiment_id, identity.key, identity.recipe, workspace_id()
        )
    except MlflowException as error:
        raise UserError(explain(uri, error)) from None


def recipe_at(commit: str) -> str | None:
    """Return the recipe of the experiment in a commit's params.yaml, dvc.yaml and dvc.lock.

    None if a file is missing or invalid, or if the experiment was not run before the commit.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        content, declared, lock = (
            yaml.load(git("show", f"{commit}:./{name}", strip=False) or "")
            for name in (PARAMS_FILE, DVC_FILE, "dvc.lock")
        )
        params = parse_params(content)
        stages = lock["stages"].values()
        # dvc.lock knows the code of the last run, and generated code, which git does not have.
        code = locked_code_digests(declared, lock) | _code_of(commit, declared)
    except (YAMLError, UserError, TypeError, KeyError, AttributeError, TarError):
        return None
    digests = {
        dep["path"].removesuffix("/."): dep.get("md5")
        for stage in stages
        for dep in stage.get("deps", [])
    }
    inputs = {key: digests.get(path.removesuffix("/")) for key, path in params.inputs.items()}
    known = {key: digest for key, digest in inputs.items() if digest}
    return recipe_digest(resolved(params), known, code) if len(known) == len(inputs) else None


def _code_of(commit: str, declared: Any) -> dict[str, str]:
    """Return the result of `code_digests` for the files that git has in a commit."""
    names = (DVC_FILE, IGNORE_FILE, *code_paths(declared))
    listed = git("ls-tree", "--name-only", "-z", commit, "--", *names, strip=False) or ""
    with tempfile.TemporaryDirectory(prefix="gptj8-code-") as scratch:
        folder, archive = Path(scratch) / "code", Path(scratch) / "code.tar"
        (folder / ".dvc").mkdir(parents=True)
        found = listed.rstrip("\0").split("\0")
        if git("archive", "--format=tar", f"--output={archive}", commit, "--", *found) is None:
            return {}
        shutil.unpack_archive(archive, folder, "tar", filter="data")
        return code_digests(folder)


def _experiment(name: str) -> str | None:
    """Return the commit that DVC created for an experiment, or None."""
    listed = git("for-each-ref", "--format=%(objectname) %(refname:lstrip=4)", "refs/exps")
    matches = (line.split(" ", 1) for line in (listed or "").splitlines())
    return next((commit for commit, known in matches if known == name), None)
