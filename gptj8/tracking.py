"""MLflow, and nothing else: the only module that imports it, with `registry`, which it calls.

DVC decides what runs; this records it. One experiment is one MLflow run, found again by the digest
of everything that decides its outcome (params, data, base model), so every stage process, now or in
a later `dvc repro`, writes to the same row. A stage also records what the stages before it left in
`reports/`, because DVC may have taken those from its cache without starting a process.

Recording never stops the work: the first failure is reported once, and the rest is left out.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj8 import registry
from gptj8.errors import UserError
from gptj8.files import read_json, sha256_tree
from gptj8.params import Params, resolved
from gptj8.runtime import project_root
from gptj8.words import one_line

STAGES = ("validate", "convert", "finetune", "evaluate", "export")
REPORTS = Path("reports")

# What a stage's inputs were made by. What of these came from DVC's cache is recorded by the stage.
_ANCESTORS = {
    "validate": (),
    "convert": (),
    "finetune": ("validate", "convert"),
    "evaluate": ("validate", "convert", "finetune"),
    "export": ("validate", "convert", "finetune", "evaluate"),
}
_CURVES = {"finetune": ("loss.csv", "eval_loss.csv")}
_ARTIFACTS = {"finetune": (Path("artifacts/adapter"), "adapter")}

_KEY_TAG = "gptj8.key"
_NOT_IN_A_NAME = r"[^\w\-. ]"  # nor MLflow's separator of folders
_PARAM_LENGTH = 6000  # MLflow's limit for one value


class StageRun:
    """The MLflow run of one experiment, as one stage sees it.

    Made by `stage_run`; every method is safe to call with the server away.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.run_id: str | None = None
        self._client: Any = None
        self._alive = True
        self._last_step = 0

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers as `<stage>/<key>`; nested dicts are joined with `/`."""
        self._last_step = max(self._last_step, step or 0)
        self._log_stage_metrics(self.stage, metrics, step)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a file or directory into the run's artifacts."""
        path = str(path)
        method = "log_artifacts" if os.path.isdir(path) else "log_artifact"
        self._call(method, path, folder)

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._call("set_tag", key, value)

    def register_model(
        self, name: str, base: Path, export: Path, metrics: Mapping[str, Mapping[str, float]]
    ) -> str:
        """Make an export, with the base it belongs to, a version of a model in the registry.

        The very same export is registered once.

        Args:
            name: of the registered model, made if need be.
            base, export: folders, copied whole.
            metrics: stage -> flat name -> value; tags of the version.

        Returns:
            the number of the version.

        Raises:
            UserError: if that fails. Unlike all other recording it was asked for by name, and
                whoever deploys relies on it.
        """
        try:
            if not self._alive:
                raise UserError("the tracking server is away")
            return registry.register(self._client, str(self.run_id), name, base, export, metrics)
        except Exception as error:
            raise UserError(
                f"tracking.registered_model_name = {name}: not registered, {one_line(error)}; the "
                f"export is complete in {export}, run again to register it"
            ) from error

    def _start(self, params: Params) -> None:
        if not all(Path(path).exists() for path in params.inputs.values()):
            # DVC may convert a model before it has made the dataset, and the experiment has no key
            # until both are there. The stages that follow record what this one leaves.
            self._alive = False
            return
        try:
            self._client, experiment_id = _connect(params)
            self.run_id, is_new = _find_or_create(self._client, experiment_id, params)
        except Exception as error:  # whatever is wrong with tracking, the work goes on
            self._give_up(error)
            return
        if is_new:
            self._log_params(params)
        self._call("update_run", status="RUNNING")
        for earlier in _ANCESTORS[self.stage]:
            self._log_report(earlier, "cached", only_if_new=True)

    def _finish(self, status: str) -> None:
        if status == "FINISHED":
            self._log_report(self.stage, "ran")
        self._call("set_terminated", status=status)

    def _log_params(self, params: Params) -> None:
        from mlflow.entities import Param

        flat = {k: _as_text(v)[:_PARAM_LENGTH] for k, v in flatten(resolved(params), ".").items()}
        self._call("log_batch", params=[Param(key, value) for key, value in flat.items()])

    def _log_report(self, stage: str, origin: str, only_if_new: bool = False) -> None:
        folder = REPORTS / stage
        if not self._alive or not (folder / "metrics.json").exists():
            return
        tag = f"stage.{stage}"
        try:
            tags = self._client.get_run(self.run_id).data.tags
        except Exception as error:
            self._give_up(error)
            return
        if only_if_new and tag in tags:
            return
        # MLflow shows the value of the last step: a stage's result must not hide behind its curve.
        step = self._last_step if stage == self.stage else 0
        if stage != self.stage:
            step = self._replay(stage)
        self._log_stage_metrics(stage, read_json(folder / "metrics.json"), step)
        self._call("log_artifacts", str(folder), f"reports/{stage}")
        self._log_datasets(folder / "inputs.json")
        self.set_tag(tag, origin)

    def _log_datasets(self, file: Path) -> None:
        """Record the datasets that a stage read and made, by the digests that DVC knows them by."""
        if not self._alive or not file.is_file():
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        content = read_json(file)
        read = [(item["split"], item["path"], item["md5"]) for item in content["files"]]
        made = [("prepared", "artifacts/dataset", content["prepared"])]
        inputs = [
            DatasetInput(
                Dataset(Path(path).name, digest, "local", json.dumps({"uri": path})),
                [InputTag("mlflow.data.context", context)],
            )
            for context, path, digest in read + made
        ]
        self._call("log_inputs", datasets=inputs)

    def _replay(self, stage: str) -> int:
        """Record the curves and artifacts of a stage that did not run; return its last step."""
        last = 0
        for name in _CURVES.get(stage, ()):
            file = REPORTS / stage / name
            if file.is_file():
                with open(file, newline="", encoding="utf-8") as stream:
                    for point in csv.DictReader(stream):
                        step = int(point.pop("step"))
                        values = {key: float(value) for key, value in point.items() if value}
                        self._log_stage_metrics(stage, values, step)
                        last = max(last, step)
        if stage in _ARTIFACTS and _ARTIFACTS[stage][0].is_dir():
            self.log_artifact(*_ARTIFACTS[stage])
        return last

    def _log_stage_metrics(
        self, stage: str, metrics: Mapping[str, Any], step: int | None = None
    ) -> None:
        if not self._alive:
            return
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        batch = [
            Metric(f"{stage}/{key}", float(value), now, step or 0)
            for key, value in flatten(metrics, "/").items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        self._call("log_batch", metrics=batch)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        if not self._alive:
            return
        try:
            getattr(self._client, method)(self.run_id, *args, **kwargs)
        except Exception as error:  # whatever is wrong with tracking, the work goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._alive = False
        print(f"warning: MLflow does not record this stage: {one_line(error)}", file=sys.stderr)


@contextmanager
def stage_run(stage: str, params: Params) -> Iterator[StageRun]:
    """Record one stage of the experiment that `params` describes.

    The run is marked running at the start and finished, failed or killed at the end. What the stage
    left in `reports/<stage>` becomes its metrics and artifacts.
    """
    run = StageRun(stage)
    run._start(params)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run._finish("KILLED")
        raise
    except BaseException:
        run._finish("FAILED")
        raise
    run._finish("FINISHED")


def log_comparison(
    params: Params, rows: Sequence[Mapping[str, Any]], files: Sequence[str | Path]
) -> None:
    """Record the table of `gptj8 compare` as a run, which the same comparison finds again.

    Args:
        params: what the approaches have in common.
        rows: of `gptj8.approaches.table_rows`; their numbers become `<approach>/<column>`.
        files: the table, as artifacts.
    """
    from mlflow.entities import Metric, RunTag
    from mlflow.utils.time import get_current_time_millis

    compared = {row["approach"]: row for row in rows if row["status"] != "evaluated"}
    content = json.dumps({"comparison": sorted(compared), "params": resolved(params)})
    key = hashlib.sha256(content.encode()).hexdigest()
    tags = {"gptj8.kind": "comparison", _KEY_TAG: key}
    now = get_current_time_millis()
    metrics = [
        Metric(f"{re.sub(_NOT_IN_A_NAME, '_', row['approach'])}/{column}", float(value), now, 0)
        for row in rows
        for column, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    # Which experiments the numbers are of: the row of each is found by this name.
    results = [RunTag(f"approach.{n}", r["experiment"] or r["status"]) for n, r in compared.items()]
    try:
        client, experiment_id = _connect(params)
        found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, None, tags, "approaches")
        client.log_batch(run.info.run_id, metrics=metrics, tags=results)
        for file in files:
            client.log_artifact(run.info.run_id, str(file), "approaches")
        failed = any(row["status"] == "failed" for row in rows)
        client.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED")
    except Exception as error:  # whatever is wrong with tracking, the table is written
        print(f"warning: MLflow does not record the table: {one_line(error)}", file=sys.stderr)


def tracking_uri(params: Params) -> str:
    """Return MLFLOW_TRACKING_URI or `tracking.uri`, a relative SQLite path made absolute.

    Relative paths are the project's own: inside `dvc exp run --queue` they would otherwise lie in a
    copy that DVC removes afterwards.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return f"{prefix}{project_root() / uri.removeprefix(prefix)}"
    return uri


def experiment_key(params: Params) -> str:
    """Return the digest of what decides an experiment's outcome: params, data and base model."""
    inputs = {
        name: sha256_tree(path, cache=project_root() / ".dvc" / "tmp" / "gptj8" / "digests.json")
        for name, path in params.inputs.items()
    }
    content = json.dumps({"params": resolved(params), "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def flatten(nested: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Return a flat dict of a nested one, keys joined with `separator`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat.update({f"{key}{separator}{name}": item for name, item in inner.items()})
        else:
            flat[str(key)] = value
    return flat


def _connect(params: Params) -> tuple[Any, str]:
    from mlflow import MlflowClient

    # The tables of a new SQLite store are reported line by line, which tells the user nothing.
    # After the import, which sets levels of its own.
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(params)
    client = MlflowClient(tracking_uri=uri)
    name = params.tracking.experiment
    # Beside the database, wherever the stage's working folder is.
    location = (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        kept = experiment.artifact_location
        if location and kept.endswith("/mlartifacts") and kept != location:
            print(
                f"warning: the runs of {name} keep their artifacts in {kept}, where this project "
                "was when they began; set tracking.experiment to another name to keep them here",
                file=sys.stderr,
            )
        return client, experiment.experiment_id
    return client, client.create_experiment(name, artifact_location=location)


def _find_or_create(client: Any, experiment_id: str, params: Params) -> tuple[str, bool]:
    key = experiment_key(params)
    found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
    if found:
        return found[0].info.run_id, False
    name = os.environ.get("DVC_EXP_NAME") or _describe(params)
    tags = {_KEY_TAG: key, "dvc.experiment": os.environ.get("DVC_EXP_NAME", "")}
    run = client.create_run(experiment_id, run_name=name, tags={k: v for k, v in tags.items() if v})
    return run.info.run_id, True


def _describe(params: Params) -> str:
    data = Path(params.data.train)
    dataset = data.parent.name if data.name in {"splits", "data"} else data.stem
    method = params.finetune.method
    return f"{dataset}-{method}-r{params.finetune.r}" if method == "lora" else f"{dataset}-{method}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
