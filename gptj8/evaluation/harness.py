"""Run standard benchmarks: EleutherAI's lm-evaluation-harness on loaded models.

The harness provides tasks, prompts and metrics. The models are evaluated through its own Hugging
Face model class, so results are comparable with published tables. The model is loaded once, and not
by the harness: 8-bit weights are read from the file on demand, and an adapter is added after the
base model is measured. Alternative considered: `lm_eval --model hf` with a path; it was rejected
because it loads the model in every run, moves it, and resizes embeddings that have more rows than
the tokenizer has tokens, as in GPT-J.

Differences from the defaults of the harness: the softmax is computed in float32 for every model
dtype; likelihoods that are not finite raise an error, because an argmax would still turn them into
an accuracy; and bootstrapped standard errors use 1,000 samples instead of 100,000, which changes
them by 2 %.

The harness is an optional dependency, `pip install 'gptj8[harness]'`, and is imported on demand.
Only the dataset of a task is downloaded; no code from the Hub is executed.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import random
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line, quote, suggest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = PreTrainedModel | PeftModel

_RESAMPLES = 1000
_NOT_IN_A_NAME = re.compile(r"[^\w./-]", re.ASCII)
_DEFAULTS = {
    # Some tasks use metrics whose code the `evaluate` library downloads from the Hub and executes.
    "HF_EVALUATE_OFFLINE": "1",
    # The bootstrap would fork this process, including the model and its threads, once per core.
    "DISABLE_MULTIPROC": "1",
}


def run_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Measure a model on tasks of the harness.

    Args:
        model: loaded model, which is switched to eval mode.
        tokenizer: tokenizer of the model; it is not modified.
        tasks: names of tasks, groups or tags, or patterns such as `mmlu_*`.
        batch_size: rows per forward pass; the logits of all tokens are held in float32.
        limit: maximum number of rows per task, from its start; None uses all rows.
        num_fewshot: number of solved examples per prompt. With None, or if a task fixes the number
            at 0, the setting of the task applies.
        include_path: a directory with additional task files (YAML).
        seed: seed of few-shot examples and sampling; None uses the seeds of the harness, as in
            published tables.

    Returns:
        `<task>/<metric>`, its standard error `<task>/<metric>_stderr` if there is one, and
        `<task>/samples`, the number of measured rows. A metric with a filter is named
        `<metric>.<filter>`. Undefined values, such as the standard error of one row, are omitted.

    Raises:
        UserError: if the harness is not installed, a task is unknown, its dataset is not available,
            or a likelihood is not finite.
    """
    loaded = load_tasks(tasks, include_path, seed)
    return measure_tasks(
        model,
        tokenizer,
        loaded,
        batch_size=batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
    )


def load_tasks(
    names: Sequence[str], include_path: str | Path | None = None, seed: int | None = None
) -> list[Any]:
    """Return tasks and groups of the harness with their datasets, for `measure_tasks`.

    Loading tasks is separate from measuring, so a misspelled name is reported before a model is
    loaded.

    Args:
        names, include_path, seed: see `run_tasks`.

    Raises:
        UserError: see `run_tasks`; unknown names are listed one per line.
    """
    prepare_harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"{include_path} is not a directory of task files")
    manager = _task_manager(None if include_path is None else str(include_path))
    found = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name in names if not found[name]]
    if unknown:
        known = manager.all_tasks
        raise UserError(
            "\n".join(
                f"lm-evaluation-harness has no task {quote(name)}{suggest(name, known)}; "
                "`lm-eval ls tasks` lists all tasks"
                for name in unknown
            )
        )
    random.seed(seed or 0)  # as in the harness; some tasks shuffle their answers during loading
    loaded: list[Any] = []
    for name in dict.fromkeys(match for matches in found.values() for match in matches):
        try:
            built = manager.load([name])
        except Exception as error:  # from the network, the dataset or the code of the task
            raise UserError(_explain_load(name, error)) from error
        group = built["groups"].get(name)
        loaded += built["tasks"].values() if group is None else [group]
    if not loaded:
        raise UserError("no tasks to run: no names were given, or the tasks have no rows")
    try:
        leaves = manager.load(loaded)["tasks"]
    except ValueError as error:  # a task is listed twice, by its name and as part of a group
        raise UserError(f"{one_line(error)}; list it only once") from error
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} executes code written by the model: not supported")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} uses images: only text tasks are supported")
    return loaded


def measure_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Return the result of `run_tasks` for loaded tasks; tasks can be reused for several models."""
    prepare_harness()
    check_counts(batch_size=batch_size, limit=limit, num_fewshot=num_fewshot)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    harness_model = wrap_model(model, tokenizer, batch_size)
    kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeds = {} if seed is None else dict.fromkeys(kinds, seed)
    try:
        with redirect_stdout(sys.stderr):  # the harness prints progress; stdout is for results
            results = simple_evaluate(
                harness_model,
                tasks=list(tasks),
                # The tasks are loaded already, and indexing all task names takes seconds.
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                **seeds,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"a task needs more than its dataset from the Hub: {one_line(error)}; "
            "set HF_EVALUATE_OFFLINE=0 to download and execute the code of a metric"
        ) from error
    except AssertionError as error:  # raised by the harness if a request is too long
        raise UserError(
            f"a task does not fit into the model's context of {harness_model.max_length} tokens: "
            f"{one_line(error)}"
        ) from error
    if harness_model.truncated:
        print(
            f"lm-eval: {harness_model.truncated} of {harness_model.requested} requests were longer "
            f"than the model's context of {harness_model.max_length} tokens and were truncated at "
            "the start",
            file=sys.stderr,
        )
    return _flatten(results)


def wrap_model(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return an `HFLM` of the harness for a loaded model, which is not moved or converted."""
    from lm_eval.models.huggingface import HFLM

    from gptj8.model.scoring.perplexity import context_length

    class LoadedModel(HFLM):  # type: ignore[misc]
        """An `HFLM` that raises an error if a likelihood is not finite.

        Attributes:
            requested: number of requested likelihoods.
            truncated: number of requests whose prompt was truncated at the start.
        """

        requested = 0
        truncated = 0

        def _loglikelihood_tokens(
            self, requests: list[Any], *args: Any, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            # The last token is only a target, so a request may have one more token.
            longest = self.max_length + 1
            self.requested += len(requests)
            self.truncated += sum(len(context) + len(end) > longest for _, context, end in requests)
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
            if not all(math.isfinite(likelihood) for likelihood, _ in answers):
                raise UserError("the model's likelihoods are not finite; try --dtype float32")
            return answers

        def get_model_info(self) -> dict[str, Any]:
            """Return nothing, because the harness would query the Hub for the model revision."""
            return {}

    return LoadedModel(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),  # the harness adds a padding token
        batch_size=batch_size,
        max_length=context_length(model.config),
        softmax_dtype="float32",
        trust_remote_code=False,
    )


def prepare_harness() -> None:
    """Import the harness and show only its errors, unless the user has set its log level.

    Raises:
        UserError: if the harness is not installed.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logger = logging.getLogger("lm_eval")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            "lm-evaluation-harness is not installed; run pip install 'gptj8[harness]'"
        ) from None


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """Return the index of all tasks. This reads 14,000 files and takes 7 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _explain_load(name: str, error: BaseException) -> str:
    """Return a one-line message that explains why a task could not be loaded."""
    reason = one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError) or "httpx" in type(cause).__module__:
            return (
                f"task {name}: the dataset could not be downloaded: {reason}; check the network "
                "connection (later runs use the Hugging Face cache)"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ImportError):
        return f"task {name} needs a package that is not installed: {reason}"
    return f"task {name} cannot be loaded: {reason}"


def check_counts(*, batch_size: int, limit: int | None, num_fewshot: int | None) -> None:
    """Raise `UserError` if a count is out of range; all problems are listed, one per line."""
    problems = []
    if batch_size < 1:
        problems.append(f"batch size = {batch_size} is less than 1")
    if limit is not None and limit < 1:
        problems.append(f"limit = {limit} is less than 1; omit it to use all rows")
    if num_fewshot is not None and num_fewshot < 0:
        problems.append(f"number of few-shot examples = {num_fewshot} is negative")
    if problems:
        raise UserError("\n".join(problems))


def _flatten(results: dict[str, Any]) -> dict[str, float]:
    """Return the results of the harness under names that are valid in MLflow.

    `acc,none` becomes `acc`, and `exact_match,strict-match` becomes `exact_match.strict-match`. A
    slash instead of the dot would nest metrics, which MLflow's file store does not support.
    """
    metrics: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or isinstance(value, bool | str) or not math.isfinite(value):
                continue
            metric += "" if filter_name == "none" else f".{filter_name}"
            metrics[f"{_sanitize(task)}/{_sanitize(metric)}"] = float(value)
    for task, counts in results["n-samples"].items():
        metrics[f"{_sanitize(task)}/samples"] = float(counts["effective"])
    return metrics


def _sanitize(name: str) -> str:
    return _NOT_IN_A_NAME.sub("_", name).replace("/", "_")


def stderr_name(metric: str) -> str:
    """Return the name of the standard error of a metric; a filter suffix stays at the end."""
    name, dot, filter_name = metric.partition(".")
    return f"{name}_stderr{dot}{filter_name}"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model directory, with an end-of-text token.

    Raises:
        UserError: if there is no tokenizer, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    from gptj8.dataset.prepared.text_encoder import TextEncoder

    eos_id = TextEncoder.load(path).eos_id
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        # Otherwise the harness adds a padding token, for which the embedding has no row.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    return tokenizer
