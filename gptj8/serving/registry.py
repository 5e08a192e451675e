"""An export as a version of a model in MLflow's registry, which `mlflow models serve` can run."""

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
_TOLD = ("README.md", "metrics.json")  # of times and memory, which differ from run to run


def register_export(
    open_run: Callable[[], tuple[Any, str]],
    name: str,
    base: Path,
    export: Path,
    metrics: Mapping[str, Mapping[str, float]],
) -> str:
    """Make an export, with the base it belongs to, a version of a registered model.

    The very same export is registered once.

    Args:
        open_run: returns mlflow.MlflowClient and the id of the run whose artifacts hold the model.
        name: of the registered model, made if need be.
        base, export: folders, copied whole.
        metrics: stage -> flat name -> value; those of `_TAGGED` become the version's tags, where
            the registry shows and searches them.

    Returns:
        the number of the version.

    Raises:
        UserError: if that fails. Unlike all other recording it was asked for by name, and whoever
            deploys relies on it.
    """
    try:
        client, run_id = open_run()
        return _register(client, run_id, name, base, export, metrics)
    except Exception as error:
        raise UserError(
            f"tracking.registered_model_name = {name}: not registered, {one_line(error)}; the "
            f"export is complete in {export}, run again to register it"
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
        # A version never changes: another export of the same run lies beside it.
        folder = Path(scratch) / f"model-{digest[:12]}"
        data = _save_python_model(folder, export)
        client.log_artifacts(run_id, str(folder), folder.name)
    # Gigabytes: copied once, to where they stay.
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
    """Return the digest of what decides an answer."""
    files = [*export.iterdir(), base / MANIFEST]
    parts = [f"gptj8 {__version__}"]
    parts += [
        f"{file.name} {sha256_file(file)}"
        for file in sorted(files)
        if file.is_file() and file.name not in _TOLD
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _save_python_model(folder: Path, export: Path) -> str:
    """Write what MLflow loads and serves, but for the base: the export, and the code that reads it,
    without a pickle. Return where its data lies in `folder`.

    The code of this package lies beside it, so that a server without a checkout can run it; what
    that imports is named with its versions.
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
    """Return what MLflow checks a request against; none for conversations, which are no text."""
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
