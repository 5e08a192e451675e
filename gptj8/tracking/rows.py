"""Find an experiment's run in MLflow, also while several clones of a project use one server.

A run is written by the clone that created it, so two clones that begin the same experiment at once
make two whole runs instead of sharing one, with curves of both and a status that the first to end
decides. A clone that repeats what another has completed goes on with the complete run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient

from gptj8.runtime.project import STAGES

KEY_TAG = "gptj8.key"
RECIPE_TAG = "gptj8.recipe"
"""The key without the versions of libraries, which can be computed from a commit."""
WORKSPACE_TAG = "gptj8.workspace"
"""The clone that writes a run; `gptj8.tracking.identity.workspace_id`."""


def find_run(client: MlflowClient, experiment_id: str, key: str, tag: str = KEY_TAG) -> Any:
    """Return the oldest run with a key, or None if there is none."""
    return next(iter(runs_with(client, experiment_id, key, tag)), None)


def runs_with(client: MlflowClient, experiment_id: str, value: str, tag: str) -> list[Any]:
    """Return the runs with a value of a tag, oldest first."""
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    return list(client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", order_by=order))


def find_row(client: MlflowClient, experiment_id: str, key: str, workspace: str) -> Any:
    """Return the run that a clone writes an experiment to, or None to create one."""
    return _usable(runs_with(client, experiment_id, key, KEY_TAG), workspace)


def find_made_row(
    client: MlflowClient, experiment_id: str, key: str, recipe: str, workspace: str
) -> Any:
    """Return the run of results that are in place, or None if they are not recorded.

    The libraries may be others than those that made the results, so without a run of the key, the
    newest one of the recipe counts.
    """
    run = find_row(client, experiment_id, key, workspace)
    if run is None:
        newest_first = runs_with(client, experiment_id, recipe, RECIPE_TAG)[::-1]
        run = _usable(newest_first, workspace)
    return run


def missing_stages(tags: dict[str, str], stages: Sequence[str]) -> list[str]:
    """Return the stages that are missing in a run's tags."""
    return [stage for stage in stages if f"stage.{stage}" not in tags]


def is_whole(run: Any) -> bool:
    """Whether a run has the results of all stages and is not being written."""
    return run.info.status == "FINISHED" and not missing_stages(run.data.tags, STAGES)


def _usable(runs: Sequence[Any], workspace: str) -> Any:
    mine = [run for run in runs if run.data.tags.get(WORKSPACE_TAG) == workspace]
    return next(iter([*mine, *filter(is_whole, runs)]), None)
