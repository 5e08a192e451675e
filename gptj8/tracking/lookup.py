"""Find the MLflow run of a commit, a DVC experiment or a run id."""

from __future__ import annotations

import re
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gptj8.params.sections import PARAMS_FILE, Params, parse_params, resolved
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.tracking.delivery import EXPERIMENTS_TAG, find_run
from gptj8.tracking.identity import experiment_key, key_of, tracking_uri, without_password
from gptj8.tracking.lineage import git

_COMMIT_TAG = "mlflow.source.git.commit"


def client_of(params: Params) -> tuple[MlflowClient, str]:
    """Return a client and the id of the MLflow experiment named in the params.

    Raises:
        UserError: if the server does not respond or does not have the experiment.
    """
    uri, name = tracking_uri(params), params.tracking.experiment
    client = MlflowClient(tracking_uri=uri)
    try:
        experiment = client.get_experiment_by_name(name)
    except MlflowException as error:
        reason = one_line(error)
        raise UserError(f"{without_password(uri)} does not respond: {reason}") from None
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
        key = key_of(params)
        run = find_run(client, experiment_id, key) if key else None
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
        key = key_at(commit)
        found += [run] if key and (run := find_run(client, experiment_id, key)) else []
        found += client.search_runs([experiment_id], f"tags.`{_COMMIT_TAG}` = '{commit}'")
    if not found:
        raise UserError(f"{what} has no run in {params.tracking.experiment}")
    return list({run.info.run_id: run for run in found}.values())


def key_at(commit: str) -> str | None:
    """Return the key of the experiment in a commit's params.yaml and dvc.lock.

    None if a file is missing or invalid, or if the experiment was not run before the commit.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        content = yaml.load(git("show", f"{commit}:./{PARAMS_FILE}", strip=False) or "")
        lock = yaml.load(git("show", f"{commit}:./dvc.lock", strip=False) or "")
        params = parse_params(content)
        stages = lock["stages"].values()
    except (YAMLError, UserError, TypeError, KeyError, AttributeError):
        return None
    digests = {
        dep["path"].removesuffix("/."): dep.get("md5")
        for stage in stages
        for dep in stage.get("deps", [])
    }
    inputs = {key: digests.get(path.removesuffix("/")) for key, path in params.inputs.items()}
    known = {key: digest for key, digest in inputs.items() if digest}
    return experiment_key(resolved(params), known) if len(known) == len(inputs) else None


def _experiment(name: str) -> str | None:
    """Return the commit that DVC created for an experiment, or None."""
    listed = git("for-each-ref", "--format=%(objectname) %(refname:lstrip=4)", "refs/exps")
    matches = (line.split(" ", 1) for line in (listed or "").splitlines())
    return next((commit for commit, known in matches if known == name), None)
