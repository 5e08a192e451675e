"""params.yaml as typed, frozen objects. No other module reads that file.

Each section is a class and each key a field, with its meaning, unit, bounds and default in one
place (the sections `data` and `finetune` in modules of their own): docs/params.md and
params.schema.json are generated from here (`gptj8.params.documentation`).
Names follow Hugging Face where a name exists. Unknown keys and wrong values raise an error that
names them, and all errors are reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gptj8.params.bounds import NonNegativeInt, PositiveInt
from gptj8.params.data import Data
from gptj8.params.finetune import Finetune
from gptj8.params.paths import NO_PATH, OptionalPath
from gptj8.params.requirements import parse_requirement
from gptj8.params.yaml_files import Section, check, read_yaml
from gptj8.runtime.errors import UserError

PARAMS_FILE = "params.yaml"
OPTIONAL_PATHS = (
    ("data", "validation"),
    ("data", "test"),
    ("quantization", "calibration"),
    ("evaluate", "perplexity_text"),
    ("evaluate", "predictions"),
)


class Model(Section):
    """The base model."""

    path: str
    """Model directory as `save_pretrained` writes it: config, weights and tokenizer."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type for computation. `auto`: bfloat16 if the hardware supports it, float16 on older
    GPUs, float32 otherwise."""


class Quantization(Section):
    """How the frozen weights are stored."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 128
    """Number of weights that share one scale."""
    embedding_block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 32
    """The same for embeddings and the language-model head, whose errors contribute most."""
    scale_bits: Literal[8, 32] = 8
    """Size of a scale: 8 (one of 256 levels per tensor) or 32 (float32)."""
    codebook: Literal["dynamic", "fitted"] = "fitted"
    """The 256 values that a code can represent: `fitted` to each tensor, or `dynamic`,
    bitsandbytes' map."""
    skip_modules: tuple[str, ...] = ()
    """Names of modules to leave unquantized."""
    calibration: OptionalPath = None
    """A UTF-8 text file of the kind that the model is for. Its activations weigh the columns of
    each matrix, which makes the 8-bit model more accurate. `data/none`: no calibration."""


class Evaluate(Section):
    """Perplexity, accuracy and the export gate."""

    few_shot: NonNegativeInt = 4
    """Number of solved examples in each few-shot prompt. 0: no few-shot evaluation."""
    perplexity_text: OptionalPath = None
    """Held-out text for perplexity, in any format that `data` reads. `data/none`: the test
    split."""
    max_perplexity_documents: PositiveInt | None = None
    """Use only the first N documents for perplexity. `null`: use all."""
    per_device_eval_batch_size: PositiveInt = 16
    """Maximum number of rows per forward pass."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of a generated completion. A generated label may be as long as the
    longest label."""
    max_generated_rows: NonNegativeInt | None = None
    """Generate answers for the first N test rows only. `null`: for all."""
    predictions: OptionalPath = None
    """Predictions of another system for the test rows: a CSV file with the columns `file`, `row`
    and `prediction`, or a directory of such files. `data/none`: compare no other systems."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    """Number of bootstrap resamples for confidence intervals."""
    require: tuple[str, ...] = ()
    """Conditions on the metrics that must hold for the model to be exported, for example
    `tuned/accuracy > base/accuracy`."""

    @field_validator("require")
    @classmethod
    def _can_be_parsed(cls, require: tuple[str, ...]) -> tuple[str, ...]:
        for requirement in require:
            parse_requirement(requirement)
        return require


class Export(Section):
    """The exported adapter."""

    merge: bool = False
    """Also write a merged 16-bit model, which loads with transformers alone."""


class Tracking(Section):
    """Where MLflow stores the runs. Changing `experiment` or `uri` reruns nothing."""

    experiment: str = "gptj8"
    """Name of the MLflow experiment."""
    uri: str | None = "sqlite:///mlflow.db"
    """MLflow tracking URI. The environment variable `MLFLOW_TRACKING_URI` takes precedence. `null`:
    record nothing."""
    registered_model_name: str | None = None
    """Register each export under this name in MLflow's model registry. `null`: do not register."""
    registered_model_alias: str | None = "champion"
    """Alias of the last export that met `evaluate.require`, for `models:/NAME@ALIAS`. `null`: set
    none."""

    @field_validator("registered_model_alias")
    @classmethod
    def _is_an_alias(cls, alias: str | None) -> str | None:
        if alias is None or (
            re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII)
            and not (alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE))
        ):
            return alias
        raise ValueError(
            "must consist of letters, digits, - and _, and must not be latest or v1, v2, ..., "
            "which MLflow reserves"
        )


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's initial weights, the order of rows, few-shot examples and
    bootstraps."""
    data: Data
    model: Model
    quantization: Quantization = Quantization()
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _metric_is_measured(self) -> Params:
        if self.finetune.metric_for_best_model == "eval_accuracy" and (
            self.data.task != "classification"
        ):
            raise ValueError(
                "finetune.metric_for_best_model = eval_accuracy needs data.task = classification, "
                f"but the task is {self.data.task}; use auto or eval_loss"
            )
        return self

    def for_one_of(self, processes: int) -> Params:
        """Return the params of one of several processes that share each optimizer step.

        Raises:
            UserError: if `finetune.train_batch_size` cannot be divided among them.
        """
        finetune = self.finetune
        total, micro = finetune.train_batch_size, finetune.per_device_train_batch_size
        if micro == "auto":
            total = finetune.sequences_per_step
            if total % processes:
                raise UserError(
                    f"finetune.train_batch_size = {total} cannot be divided by {processes} "
                    "processes; choose a multiple"
                )
            share = total // processes
        else:
            share = micro * finetune.gradient_accumulation_steps
            if total not in (None, share * processes):
                raise UserError(
                    f"finetune.train_batch_size = {total} is not per_device_train_batch_size x "
                    f"gradient_accumulation_steps x processes = {share * processes}; set "
                    "per_device_train_batch_size to auto, or train_batch_size to null"
                )
        mine = finetune.model_copy(update={"train_batch_size": share})
        return self.model_copy(update={"finetune": mine})

    @property
    def inputs(self) -> dict[str, str]:
        """The files and directories that a run reads, by key; unset ones are omitted."""
        inputs = {
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "data.test": self.data.test,
            "model.path": self.model.path,
            "quantization.calibration": self.quantization.calibration,
            "evaluate.perplexity_text": self.evaluate.perplexity_text,
            "evaluate.predictions": self.evaluate.predictions,
        }
        return {key: path for key, path in inputs.items() if path is not None}


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: with one line per unknown key or wrong value.
    """
    return check_params(read_yaml(path), path)


def check_params(
    content: dict[str, Any], path: str | Path = PARAMS_FILE, source: str | None = None
) -> Params:
    """Check params that are already parsed from YAML, including the paths of a project.

    Args:
        content: parsed params.yaml.
        path: of that file.
        source: how errors refer to it; None for `path`.

    Raises:
        UserError: with one line per problem.
    """
    source = source or str(path)
    params = parse_params(content, source)
    problems = null_paths(content, path)
    problems += [
        f"{source}: {key} = {value!r} {_outside(value)}"
        for key, value in params.inputs.items()
        if Path(value).is_absolute() or ".." in Path(value).parts
    ]
    problems += [
        f"{source}: {key} = {value!r} is not a path"
        for key, value in params.inputs.items()
        if value.startswith("-") or "\0" in value
    ]
    if problems:
        raise UserError("\n".join(problems))
    return params


def _outside(value: str) -> str:
    """Return what is wrong with a path that is absolute or leads out of the project."""
    with suppress(ValueError):
        relative = Path(os.path.abspath(value)).relative_to(Path.cwd())
        return f"is not relative to the project; use {str(relative)!r}"
    return "is outside the project; put it, or a link to it, into the project's folder"


def null_paths(content: Mapping[str, Any], path: str | Path = PARAMS_FILE) -> list[str]:
    """Return one line per path that is null, which DVC cannot resolve.

    Args:
        content: parsed params.yaml.
        path: of that file. Commits before `data/none` have a file named `None` next to it, which
            null resolved to; null is valid there.
    """
    if (Path(path).parent / "None").exists():
        return []
    return [
        f"{path}: {section}.{key} is null, which DVC cannot resolve; use {NO_PATH} for no path"
        for section, key in OPTIONAL_PATHS
        if isinstance(content.get(section), Mapping) and content[section].get(key, NO_PATH) is None
    ]


def parse_params(content: dict[str, Any], source: str = PARAMS_FILE) -> Params:
    """Check types and values of parsed params, but not their paths; see `check_params`."""
    return check(Params, content, source)


def resolved(params: Params) -> dict[str, Any]:
    """Return everything that determines a run's result: all sections except `tracking`."""
    return params.model_dump(mode="json", exclude={"tracking"})
