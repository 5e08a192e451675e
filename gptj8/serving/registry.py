"""Register an export as a model version in MLflow, for use with `mlflow models serve`."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import sha256_file
from gptj8.runtime.manifest import MANIFEST
from gptj8.runtime.messages import one_line
from gptj8.runtime.version import __version__
from gptj8.serving.mlflow_model import BASE, EXPORT, LIBRARIES, NEW_TOKENS

if TYPE_CHECKING:
    from gptj8.serving.task import TunedTask

_DIGEST_TAG = "gptj8.export"
_TAGGED = ("evaluate", "export")
_NOT_HASHED = ("README.md", "metrics.json")  # contain times and memory, which differ between runs


def register_export(
    open_run: Callable[[], tuple[Any, str]],
    name: str,
    base: Path,
    export: Path,
    metrics: Mapping[str, Mapping[str, float]],
) -> str:
    """Register an export with its base model as a model version.

    An identical export is registered only once.

    Args:
        open_run: returns an mlflow.MlflowClient and the id of the run that stores the model.
        name: name of the registered model; created if needed.
        base, export: folders, copied completely.
        metrics: stage -> flat name -> value; those of `_TAGGED` become tags of the version, which
            the registry can show and search.

    Returns:
        the version number.

    Raises:
        UserError: if the registration fails. Other recording errors are only warnings, but the
            registration was requested explicitly and a deployment relies on it.
    """
    try:
        client, run_id = open_run()
        return _register(client, run_id, name, base, export, metrics)
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
    digest = _digest(base, export)
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get(_DIGEST_TAG) == digest:
            return str(known.version)
    with tempfile.TemporaryDirectory(prefix="gptj8-register-") as scratch:
        # A version never changes, so each export of a run gets its own folder.
        folder = Path(scratch) / f"model-{digest[:12]}"
        data = _save_python_model(folder, export)
        client.log_artifacts(run_id, str(folder), folder.name)
    # The base is large, so upload it directly instead of copying it to the scratch folder first.
    client.log_artifacts(run_id, str(base), f"{folder.name}/{data}/{BASE}")
    source = f"{client.get_run(run_id).info.artifact_uri}/{folder.name}"
    tags = {
        f"{stage}.{name.replace('/', '.')}": f"{metrics[stage][name]:.6g}"
        for stage in _TAGGED
        for name in metrics.get(stage, {})
    }
    tags[_DIGEST_TAG] = digest
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def _digest(base: Path, export: Path) -> str:
    """Return a digest of everything that determines the answers."""
    files = [*export.iterdir(), base / MANIFEST]
    parts = [f"gptj8 {__version__}"]
    parts += [
        f"{file.name} {sha256_file(file)}"
        for file in sorted(files)
        if file.is_file() and file.name not in _NOT_HASHED
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
    tokens = ParamSpec("max_new_tokens", DataType.long, NEW_TOKENS)
    answer = Schema([ColSpec(DataType.string, "completion")])
    return ModelSignature(Schema(inputs), answer, ParamSchema([tokens]))
