"""Send journals to MLflow runs.

Sending is idempotent: the run is found by its key, metric points carry their original timestamps,
which MLflow deduplicates, and data that a run already has is not sent again. Rerunning a stage with
the same result changes nothing. Neither does resending a journal that was half sent when the server
became unreachable.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from gptj8.runtime.errors import UserError
from gptj8.runtime.locks import locked
from gptj8.runtime.project import state_folder
from gptj8.serving.logged_models import logged_model_of
from gptj8.tracking.description import CHANGED_CODE_TAG, Changes, changes_since, run_note
from gptj8.tracking.identity import artifact_location
from gptj8.tracking.journal import Event, now, read_events, read_state, update_state
from gptj8.tracking.page import CHANGED_TAG, NOTE_TAG, experiment_tags
from gptj8.tracking.rows import (
    KEY_TAG,
    RECIPE_TAG,
    WORKSPACE_TAG,
    find_made_row,
    find_row,
    find_run,
    is_whole,
)
from gptj8.tracking.server_errors import is_permanent, is_race, reach

SWEEP_TAG = "gptj8.sweep"
ERROR_TAG = "gptj8.error"
EXPERIMENTS_TAG = "dvc.experiments"
"""All names that DVC has given to the experiment of a run, one per line."""
_OF_THE_MODEL = ("evaluate/tuned/", "export/")
"""Beginnings of the names of metrics that a logged model shows; without ends of intervals."""
_CONTEXT = "mlflow.data.context"
_TABLES_TAG = "mlflow.loggedArtifacts"
_RACE_SECONDS = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Pauses before retries after a race in the server's database."""
_BATCH = 500  # MLflow accepts 1,000 metrics, 100 params and 100 tags per request


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str, str]:
    """Return a client, the experiment's id and its artifact location; create the experiment if
    needed.

    Raises:
        UserError: if the experiment is deleted.
        Exception: an error of mlflow or the network.
    """
    # Creating a new SQLite store logs one line per table. Set the levels here because importing
    # mlflow sets its own.
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    reach(uri)
    client = MlflowClient(tracking_uri=uri)
    # One process at a time, so that a new database or experiment is created only once.
    with locked(state_folder() / "connect.lock"):
        found = client.get_experiment_by_name(experiment)
        tags = experiment_tags(now())
        if found is None:
            try:
                made = client.create_experiment(experiment, artifact_location(uri), tags=tags)
            except MlflowException:  # another machine created it first, or the server rejects it
                found = client.get_experiment_by_name(experiment)
                if found is None:
                    raise
            else:
                found = client.get_experiment(made)
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {experiment} is deleted; restore it, or set "
            "tracking.experiment to another name"
        )
    for key in tags.keys() - found.tags.keys():
        with suppress(MlflowException):  # the user may write runs but not experiments
            client.set_experiment_tag(found.experiment_id, key, tags[key])
    return client, found.experiment_id, found.artifact_location


class Delivery:
    """Send one journal, resuming after the last event that was sent.

    Attributes:
        run_id: id of the run; empty until the journal's first event is sent.
        rejected: one line per event that the server will never accept. These events are skipped,
            because retrying them would block all later events.
    """

    def __init__(self, journal: Path, client: MlflowClient, experiment_id: str) -> None:
        self.journal = journal
        self.run_id = ""
        self.rejected: list[str] = []
        self._client = client
        self._experiment_id = experiment_id
        self._sent = read_state(journal).get("sent", 0)
        self._tags: dict[str, str] = {}
        self._params: dict[str, str] = {}
        self._known: dict[str, set[tuple[int, float]]] = {}
        self._again = False
        self._is_whole_of_another = False

    def advance(self) -> bool:
        """Send the events written since the last call; return whether the journal has ended.

        Raises:
            Exception: an error of mlflow or the network; events already sent are not sent again.
        """
        events, ends = read_events(self.journal, self._sent)
        if not self.run_id and (self._sent or events):
            # Later events need the run id, also after a restart.
            self._start(read_events(self.journal)[0][0])
        done = False
        while events:
            count = self._batch(events)
            self._apply(events[:count])
            self._sent = ends[count - 1]
            update_state(self.journal, sent=self._sent, phase="sending", run_id=self.run_id)
            done = done or events[count - 1]["event"] == "end"
            events, ends = events[count:], ends[count:]
        return done

    def _batch(self, events: Sequence[Event]) -> int:
        """Return how many events to send together; only metrics, many and small, are batched."""
        count = 0
        while count < min(len(events), _BATCH) and events[count]["event"] == "metrics":
            count += 1
        return max(1, count)

    def _apply(self, events: Sequence[Event]) -> None:
        kind = events[0]["event"]
        pauses = list(_RACE_SECONDS)
        while True:
            try:
                if kind == "metrics":
                    self._log_metrics(events)
                else:
                    getattr(self, f"_on_{kind}")(events[0])
                return
            except MlflowException as error:
                if is_race(error) and pauses:
                    # Random, so that two processes do not meet again and again.
                    time.sleep(pauses.pop(0) * random.uniform(0.5, 1.5))
                elif is_permanent(error):
                    self.rejected.append(f"{kind}: {' '.join(str(error).split())[:500]}")
                    return
                else:
                    raise

    def _start(self, event: Event) -> None:
        run = self._row(event)
        if run is None:
            names = {"key": KEY_TAG, "recipe": RECIPE_TAG, "workspace": WORKSPACE_TAG}
            # Journals of earlier versions lack some of them.
            tags = {tag: event[name] for name, tag in names.items() if name in event}
            tags |= {**event["tags"], **self._parent(event)}
            run = self._client.create_run(
                self._experiment_id, event["time"], tags, run_name=event["name"]
            )
        self.run_id = run.info.run_id
        self._tags = dict(run.data.tags)
        self._params = event["params"]
        # If the stage was recorded before, the run may already have its curves.
        self._again = f"stage.{event['stage']}" in self._tags
        missing = {k: v for k, v in event["params"].items() if k not in run.data.params}
        self._log_params(missing)
        owner = run.data.tags.get(WORKSPACE_TAG)
        self._is_whole_of_another = owner != event.get("workspace") and is_whole(run)
        if not self._is_whole_of_another:
            self._client.update_run(self.run_id, status="RUNNING")

    def _row(self, event: Event) -> Any:
        place = self._client, self._experiment_id, event["key"]
        workspace = event.get("workspace", "")
        if event["stage"] == "record" and "recipe" in event:  # it completes a row, and makes none
            return find_made_row(*place, event["recipe"], workspace)
        return find_row(*place, workspace)

    def _on_start(self, event: Event) -> None:
        if ERROR_TAG in self._tags:  # left by an earlier attempt
            self._client.delete_tag(self.run_id, ERROR_TAG)

    def _on_tags(self, event: Event) -> None:
        tags = dict(event["tags"])
        name = tags.get("dvc.experiment")
        if name:
            names = self._tags.get(EXPERIMENTS_TAG, "").split("\n")
            tags[EXPERIMENTS_TAG] = "\n".join(dict.fromkeys([*filter(None, names), name]))
        self._set_tags(tags)
        if "mlflow.source.git.commit" in tags:  # changes since an earlier commit are none now
            for key in (CHANGED_TAG, CHANGED_CODE_TAG):
                if key in self._tags and key not in tags:
                    self._client.delete_tag(self.run_id, key)
                    del self._tags[key]

    def _on_artifact(self, event: Event) -> None:
        path, folder = self.journal / event["file"], event["folder"]
        if not path.exists():
            self.rejected.append(f"artifact: {path} does not exist")
        elif path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)
        if event.get("table"):
            tables = json.loads(self._tags.get(_TABLES_TAG, "[]"))
            table = {"path": path.name, "type": "table"}
            if table not in tables:
                self._set_tags({_TABLES_TAG: json.dumps([*tables, table])})

    def _on_datasets(self, event: Event) -> None:
        inputs = [
            DatasetInput(
                Dataset(item["name"], item["digest"], "local", json.dumps({"uri": item["path"]})),
                [InputTag(_CONTEXT, item["context"])],
            )
            for item in event["datasets"]
        ]
        self._client.log_inputs(self.run_id, datasets=inputs)

    def _on_model(self, event: Event) -> None:
        """Make the export a logged model with the run's final metrics and its dataset."""
        model = logged_model_of(self._client, self.run_id, event["digest"], self._params)
        run = self._client.get_run(self.run_id)
        names = [
            name
            for name in run.data.metrics
            if name.startswith(_OF_THE_MODEL) and not name.endswith(("_low", "_high"))
        ]
        # The run's own points, because points of other times would be drawn twice.
        points = [self._client.get_metric_history(self.run_id, name)[-1] for name in names]
        inputs = run.inputs.dataset_inputs if run.inputs else []
        dataset = next((i.dataset for i in inputs if _is_prepared(i)), None)
        of = {"dataset_name": dataset.name, "dataset_digest": dataset.digest} if dataset else {}
        metrics = [
            Metric(p.key, p.value, p.timestamp, p.step, model.model_id, run_id=self.run_id, **of)
            for p in points
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        adapter = f"runs:/{self.run_id}/adapter"
        self._client.set_logged_model_tags(model.model_id, {"adapter": adapter})
        self._client.log_model_artifact(model.model_id, str(self.journal / event["card"]))

    def _on_stage(self, event: Event) -> None:
        """Send all results of a stage that ran, or of a cached stage that the run lacks."""
        tag = f"stage.{event['stage']}"
        if event["earlier"] and tag in self._tags:
            return
        self._again = tag in self._tags
        nested = event["events"]
        while nested:
            count = self._batch(nested)
            self._apply(nested[:count])
            nested = nested[count:]
        self._set_tags({tag: event["origin"]})

    def _on_end(self, event: Event) -> None:
        if self._is_whole_of_another and event["status"] != "FINISHED":
            return  # a repetition that fails here takes nothing from what another clone completed
        if event.get("error"):
            self._set_tags({ERROR_TAG: event["error"][:5000]})
        run = self._client.get_run(self.run_id)
        note = run_note(run.data.metrics, run.data.tags, self._changes(run))
        if note is not None:
            self._set_tags({NOTE_TAG: note})
        self._client.set_terminated(self.run_id, event["status"], event["time"])

    def _changes(self, run: Any) -> Changes | None:
        """Return what changed since the last exported run that began earlier, if there is one."""
        earlier = self._client.search_runs(
            [self._experiment_id],
            f"attributes.start_time < {run.info.start_time} AND attributes.status = 'FINISHED' "
            "AND tags.`stage.export` LIKE '%'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return changes_since(earlier[0], run) if earlier else None

    def _log_metrics(self, events: Sequence[Event]) -> None:
        points = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]
        if self._again:
            points = [p for p in points if (p.step, p.value) not in self._history(p.key)]
        for start in range(0, len(points), _BATCH):
            self._client.log_batch(self.run_id, metrics=points[start : start + _BATCH])

    def _history(self, key: str) -> set[tuple[int, float]]:
        if key not in self._known:
            history = self._client.get_metric_history(self.run_id, key)
            self._known[key] = {(point.step, point.value) for point in history}
        return self._known[key]

    def _log_params(self, params: dict[str, str]) -> None:
        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), 100):
            self._client.log_batch(self.run_id, params=entities[start : start + 100])

    def _set_tags(self, tags: dict[str, str]) -> None:
        entities = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(entities), 100):
            self._client.log_batch(self.run_id, tags=entities[start : start + 100])
        self._tags |= tags

    def _parent(self, event: Event) -> dict[str, str]:
        """Return the tag that makes the run of the sweep the parent of a queued experiment."""
        name = event.get("sweep")
        if not name:
            return {}
        value = name.replace("'", "")
        with locked(state_folder() / "connect.lock"):  # a queue has several workers
            sweep = find_run(self._client, self._experiment_id, value, SWEEP_TAG)
            if sweep is None:
                tags = {SWEEP_TAG: value, "gptj8.kind": "sweep"}
                sweep = self._client.create_run(
                    self._experiment_id, event["time"], tags, run_name=name
                )
                self._client.set_terminated(sweep.info.run_id)
        return {"mlflow.parentRunId": sweep.info.run_id}


def _is_prepared(item: DatasetInput) -> bool:
    """Whether an input of a run is the dataset that `validate` wrote, with the test split."""
    return any(tag.key == _CONTEXT and tag.value == "prepared" for tag in item.tags)
