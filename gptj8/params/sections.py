"""params.yaml as typed, frozen objects: the only module that reads it.

Each section is one class, each key one field with its meaning, unit and bounds in one place.
Hugging Face's names are used where one exists. An unknown key or a wrong value is an error that
names it, and all errors are reported at once, because finding them one run at a time wastes the
user's day.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gptj8.params.requirements import parse_requirement
from gptj8.params.templates import parse_template
from gptj8.params.yaml_files import Section, check, read_yaml
from gptj8.runtime.errors import UserError

PARAMS_FILE = "params.yaml"


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NO_PATH = "data/none"
"""What params.yaml has where no path is set: DVC follows every path that dvc.yaml names, and has no
form for none of them but a file."""
OptionalPath = Annotated[
    str | None, BeforeValidator(lambda path: None if path == NO_PATH else path)
]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]

_OPTIONAL_PATHS = (
    ("data", "validation"),
    ("data", "test"),
    ("evaluate", "perplexity_text"),
    ("evaluate", "predictions"),
)
_NAMED = ("text", "prompt", "messages")  # fields of a template whose column has a param


class Data(Section):
    """Where the rows are and how one becomes a prompt."""

    train: str
    """A file, or a directory: of files named after the splits, or of training rows only."""
    validation: OptionalPath = None
    """A file or directory; data/none: `train`'s own, else rows held out of `train`."""
    test: OptionalPath = None
    """A file or directory; data/none: `train`'s own, else rows held out of `train`."""
    train_files: str | None = None
    """Pattern of the files to read where `train` is a directory, such as `2024-*.csv.gz`."""
    validation_files: str | None = None
    test_files: str | None = None
    text_row: Literal["line", "file"] = "line"
    """What a row of plain text is: a line, or a whole file."""
    validation_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the rows held out by content hash where no validation file is given."""
    test_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the rows held out by content hash where no test file is given."""
    task: Literal["classification", "completion", "text"] = "classification"
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    optional_columns: tuple[str, ...] = ("input",)
    """Columns of the template that may be empty; the words before such a cell are left out."""
    labels: tuple[str, ...] | None = None
    """The labels there are; another one is an invalid row. null: whatever train has."""
    prompt_template: str = "{text}\n\nLabel:"
    """How a row becomes a prompt: fields in braces are columns, see
    `gptj8.dataset.readers.row_shapes`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of prompt and completion together; a longer text is cut, its completion never."""
    on_invalid: Literal["error", "drop"] = "drop"
    """What to do with rows that fail a check: stop, or drop and report them."""
    max_invalid_fraction: Fraction = 0.05
    """More invalid rows than this share stop the run even when they could be dropped."""
    on_leak: Literal["error", "drop", "warn"] = "error"
    """What to do with a row whose text, or nearly so, is in a later split as well."""
    near_duplicate_threshold: Annotated[float, Field(ge=0.5, lt=1)] | None = 0.6
    """Texts at least this alike (Jaccard, runs of 5 characters) are near-duplicates; null: off."""
    on_near_duplicate: Literal["drop", "warn"] = "warn"
    """What to do with near-duplicates within a split; exact ones are always dropped."""
    engine: Literal["local", "dask"] = "local"
    """Where rows are checked: this process, or the workers of a Dask cluster."""

    @model_validator(mode="after")
    def _template_fits_the_task(self) -> Data:
        if self.task != "text":
            # The rules for templates live with their meaning, and need nothing but the standard
            # library.
            fields = parse_template(self.prompt_template, self.task).fields
            columns = {getattr(self, f"{f}_column") if f in _NAMED else f for f in fields}
            answer = "label" if self.task == "classification" else "completion"
            column = getattr(self, f"{answer}_column")
            if column in columns and "messages" not in fields:
                raise ValueError(
                    f"{answer}_column = {column} is a column of prompt_template as well; a prompt "
                    "that holds its answer teaches nothing"
                )
        if self.labels is not None and self.task != "classification":
            raise ValueError(f"labels are for task=classification, and the task is {self.task}")
        return self


class Model(Section):
    """The base model."""

    path: str
    """A directory as `save_pretrained` writes it: config, weights, tokenizer."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it, else float16 or float32."""


class Quantization(Section):
    """How the frozen weights are stored."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 4096
    """Weights that share one absmax."""
    codebook: Literal["dynamic", "fitted"] = "fitted"
    """The 256 values a code can stand for: bitsandbytes' dynamic map, or one fitted per tensor."""
    skip_modules: tuple[str, ...] = ()
    """Names of modules to leave as they are."""


class Finetune(Section):
    """LoRA or LayerNorm training; keys are `transformers.TrainingArguments`' or PEFT's."""

    method: Literal["lora", "layernorm"] = "lora"
    target: Literal["attention", "all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: a group, or a list of module names."""
    r: PositiveInt = 8
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learning_rate: Positive = 2e-4
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    warmup_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    num_train_epochs: Positive = 2
    per_device_train_batch_size: PositiveInt | Literal["auto"] = 8
    """Sequences in memory at a time; auto: as many as fit, see `train_batch_size`."""
    gradient_accumulation_steps: PositiveInt = 1
    """Set by auto, and then left at 1 here."""
    train_batch_size: PositiveInt | None = None
    """Sequences an optimizer step, which auto divides; null: 8. A number beside a number of
    `per_device_train_batch_size` must be the product of the other two."""
    checkpointing: Literal["full", "reuse", "selective", "none", "auto"] = "auto"
    """What is computed again in backward instead of kept
    (`gptj8.training.activation_checkpointing`); auto: as little as the memory allows. The result is
    the same."""
    optim: Literal["adamw_bnb_8bit", "adamw_torch"] = "adamw_bnb_8bit"
    logging_steps: PositiveInt = 10
    eval_steps: PositiveInt = 100
    """Steps between two measurements on the validation split: loss, and accuracy of labels."""
    launcher: str | None = None
    """torchrun's command line, for several processes in training and evaluation, such as
    `torchrun --nproc-per-node 2`; null: this process alone."""
    max_eval_samples: PositiveInt | None = None
    """Measure on the first so many examples of it; null: on all."""
    save_minutes: Annotated[float, Field(ge=0)] | None = 5
    """Between two states that an interrupted training goes on from, at least; null: only SIGINT and
    SIGTERM leave one. The result is the same."""

    @property
    def sequences_a_step(self) -> int:
        """Sequences an optimizer step: of one process, or where `auto` chooses, of all together."""
        if self.per_device_train_batch_size == "auto":
            return self.train_batch_size or 8
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @field_validator("launcher")
    @classmethod
    def _is_torchrun(cls, launcher: str | None) -> str | None:
        if launcher is not None:
            words = shlex.split(launcher)  # a ValueError, for a quote that is not closed
            if words[:1] != ["torchrun"]:
                raise ValueError(f"{launcher!r} is not a command line of torchrun")
        return launcher

    @model_validator(mode="after")
    def _batch_sizes_agree(self) -> Finetune:
        micro, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if micro == "auto":
            if steps != 1:
                raise ValueError(
                    f"gradient_accumulation_steps = {steps} beside per_device_train_batch_size = "
                    "auto, which chooses it; leave it at 1 and set train_batch_size"
                )
        elif self.launcher is None and self.train_batch_size not in (None, micro * steps):
            raise ValueError(
                f"train_batch_size = {self.train_batch_size} is not per_device_train_batch_size x "
                f"gradient_accumulation_steps = {micro} x {steps}; set per_device_train_batch_size "
                "to auto, or train_batch_size to null"
            )
        return self


class Evaluate(Section):
    """Perplexity and accuracy."""

    few_shot: NonNegativeInt = 4
    """Solved examples before each few-shot prompt; 0 leaves few-shot out."""
    perplexity_text: OptionalPath = None
    """Held-out text to measure perplexity on, a file as in `data`; data/none: the test split."""
    max_perplexity_documents: PositiveInt | None = None
    """Measure on the first so many documents only; null: on all."""
    per_device_eval_batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 64
    """Tokens of a generated completion; a label has as many as the longest takes."""
    max_generated_rows: NonNegativeInt | None = None
    """Let the models write an answer to the first so many rows; null: to all."""
    predictions: OptionalPath = None
    """A CSV of what another system predicts for the test rows, or a directory of such."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    require: tuple[str, ...] = ()
    """What must hold of the metrics for the model to be exported, such as
    `tuned/accuracy > base/accuracy`."""

    @field_validator("require")
    @classmethod
    def _can_be_checked(cls, require: tuple[str, ...]) -> tuple[str, ...]:
        for requirement in require:
            parse_requirement(requirement)
        return require


class Export(Section):
    """The deliverable."""

    merge: bool = False
    """Also write a merged 16-bit model, which needs nothing but transformers to load."""


class Tracking(Section):
    """Where MLflow keeps the runs. Changing it reruns nothing."""

    experiment: str = "gptj8"
    uri: str | None = "sqlite:///mlflow.db"
    """MLFLOW_TRACKING_URI, where set, takes precedence; null: nothing is recorded."""
    registered_model_name: str | None = None


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data
    model: Model
    quantization: Quantization = Quantization()
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    tracking: Tracking = Tracking()

    def for_one_of(self, processes: int) -> Params:
        """Return the params of one of so many processes, which share each optimizer step.

        Raises:
            UserError: if they cannot share `finetune.train_batch_size`.
        """
        finetune = self.finetune
        total, micro = finetune.train_batch_size, finetune.per_device_train_batch_size
        if micro == "auto":
            total = finetune.sequences_a_step
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
        """The files and folders that a run reads, by their keys; those that are not null."""
        inputs = {
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "data.test": self.data.test,
            "model.path": self.model.path,
            "evaluate.perplexity_text": self.evaluate.perplexity_text,
            "evaluate.predictions": self.evaluate.predictions,
        }
        return {key: path for key, path in inputs.items() if path is not None}


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: listing unknown keys and wrong values, a line each.
    """
    content = read_yaml(path)
    params = parse_params(content, str(path))
    problems = null_paths(content, path)
    problems += [
        f"{path}: {key} = {value!r} leads out of the project; put the data, or a link to it, into "
        "the project's folder"
        for key, value in params.inputs.items()
        if Path(value).is_absolute() or ".." in Path(value).parts
    ]
    problems += [
        f"{path}: {key} = {value!r} is no path"
        for key, value in params.inputs.items()
        if value.startswith("-") or "\0" in value
    ]
    if problems:
        raise UserError("\n".join(problems))
    return params


def null_paths(content: Mapping[str, Any], path: str | Path = PARAMS_FILE) -> list[str]:
    """Return a line for each path in already parsed YAML that DVC has no form for.

    Args:
        content: of params.yaml.
        path: of the file. In a commit that has the file `None` beside it, null is what DVC reads.
    """
    if (Path(path).parent / "None").exists():
        return []
    return [
        f"{path}: {section}.{key} is null, and DVC follows every path; write {NO_PATH} for none"
        for section, key in _OPTIONAL_PATHS
        if isinstance(content.get(section), Mapping) and content[section].get(key, NO_PATH) is None
    ]


def parse_params(content: dict[str, Any], source: str = PARAMS_FILE) -> Params:
    """Check already parsed YAML; see `load_params`."""
    return check(Params, content, source)


def resolved(params: Params) -> dict[str, Any]:
    """Return what decides a run's outcome: every section but `tracking`, defaults filled in."""
    return params.model_dump(mode="json", exclude={"tracking"})
