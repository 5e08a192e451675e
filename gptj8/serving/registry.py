"""Register an export as a model version in MLflow, for use with `mlflow models serve`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.serving.logged_models import DIGEST_TAG, export_digest, logged_model_of
from gptj8.serving.mlflow_model import BASE, EXPORT, LIBRARIES

if TYPE_CHECKING:
    from gptj8.serving.task import TunedTask

_VERSIONS_TAG = "mlflow.modelVersions"
_TAGGED = ("evaluate", "export")


def register_export(
    open_run: Callable[[], tuple[Any, str]],
    name: str,
    base: Path,
    export: Path,
    metrics: Mapping[str, Mapping[str, float]],
    alias: str | None = None,
) -> str:
    """Register an export with its base model as a model version, and point an alias to it.

    An identical export is registered only once. The version is the run's logged model, so the
    registry shows the run's metrics and dataset.

    Args:
        open_run: returns an mlflow.MlflowClient and the id of the run that stores the model.
        name: name of the registered model; created if needed.
        base, export: folders, copied completely.
        metrics: stage -> flat name -> value; those of `_TAGGED` become tags of the version, which
            the registry can show and search.
        alias: alias of the version, such as `champion`; an earlier version loses it.

    Returns:
        the version number.

    Raises:
        UserError: if the registration fails. Other recording errors are only warnings, but the
            registration was requested explicitly and a deployment relies on it.
    """
    try:
        client, run_id = open_run()
        version = _register(client, run_id, name, base, export, metrics)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
        return version
    except Exception as error:
        raise UserError(
            f"tracking.registered_model_name = {name}: registration failed: {one_line(error)}; "
            f"the export in {export} is complete; rerun to register it"
        ) from error


def _register(
    client: Any,
    run_id: str,
    name: str,
    base: Path,
    export: Path,
    metrics: Mapping[str, Mapping[str, float]],
) -> str:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    digest = export_digest(base, export)
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get(DIGEST_TAG) == digest:
            return str(known.version)
    model = logged_model_of(client, run_id, digest)
    with tempfile.TemporaryDirectory(prefix="gptj8-register-") as scratch:
        folder = Path(scratch) / "model"
        data = _save_python_model(folder, export)
        client.log_model_artifacts(model.model_id, str(folder))
    # The base is large, so upload it directly instead of copying it to the scratch folder first.
    client.log_model_artifacts(model.model_id, str(base), f"{data}/{BASE}")
    tags = {
        f"{stage}.{name.replace('/', '.')}": f"{metrics[stage][name]:.6g}"
        for stage in _TAGGED
        for name in metrics.get(stage, {})
    }
    tags[DIGEST_TAG] = digest
    created = client.create_model_version(
        name, model.artifact_location, run_id, tags=tags, model_id=model.model_id
    )
    _link(client, model.model_id, created)
    return str(created.version)


def _link(client: Any, model_id: str, version: Any) -> None:
    """Link a logged model to its version, as a tracking server does and a database alone does not.

    The page of a logged model shows its versions by this tag.
    """
    known = json.loads(client.get_logged_model(model_id).tags.get(_VERSIONS_TAG, "[]"))
    link = {"name": version.name, "version": version.version}
    if link not in known:
        client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps([*known, link])})


def _save_python_model(folder: Path, export: Path) -> str:
    """Save the model in MLflow's format, without the base and without a pickle.

    This package is stored with the export, so that a server needs no checkout. The imported
    libraries are listed with their versions.

    Returns:
        the path of the model's data in `folder`.
    """
    import mlflow

    from gptj8.serving.task import TunedTask

    package = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="gptj8-model-") as scratch:
        data = Path(scratch) / "tuned"
        shutil.copytree(export, data / EXPORT, ignore=shutil.ignore_patterns("merged"))
        code = Path(scratch) / package.name
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module="gptj8.serving.mlflow_model",
            data_path=str(data),
            code_paths=[str(code)],
            signature=_signature(TunedTask.load(export)),
            pip_requirements=[
                f"{library}=={version(library).partition('+')[0]}"
                for library in ("mlflow", *LIBRARIES)
            ],
        )
    return f"data/{data.name}"


def _signature(task: TunedTask) -> Any:
    """Return the signature for MLflow's request checks; None for conversations, which are lists."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from gptj8.dataset.prepared.prompts import room_for_answer
    from gptj8.params.templates import MESSAGES

    if MESSAGES in task.shape.columns:
        return None
    inputs: list[Any] = [
        ColSpec(DataType.string, column, required=required)
        for column, required in task.columns.items()
    ]
    if task.labels:
        outputs: list[Any] = [ColSpec(DataType.string, "label")]
        outputs += [ColSpec(DataType.double, f"score_{label}") for label in task.labels]
        return ModelSignature(Schema(inputs), Schema(outputs))
    default = room_for_answer(task.max_new_tokens, task.max_length)
    tokens = ParamSpec("max_new_tokens", DataType.long, default)
    answer = Schema([ColSpec(DataType.string, "completion")])
    return ModelSignature(Schema(inputs), answer, ParamSchema([tokens]))
