"""Standard benchmarks: EleutherAI's lm-evaluation-harness on models that are already loaded.

The harness brings the tasks, their prompts and their metrics, and its own Hugging Face model class
asks our models, so that the figures are those that published tables hold. The model is loaded once,
by us, and never by the harness: 8-bit weights are read from the file as they are used, and an
adapter is put on them after they were measured alone. (Rejected: `lm_eval --model hf` with a path,
which loads a model a run, moves it, and resizes embeddings that have more rows than the tokenizer
has tokens, as GPT-J's have.)

What differs from the harness's defaults: the softmax is in float32 whatever the model computes in;
a likelihood that is not a number is refused, where an argmax would make an accuracy of it; and
standard errors that are resampled take 1,000 resamples instead of 100,000, which moves them by 2 %.

The harness is an extra, `pip install 'gptj8[harness]'`, and is imported when it is used. Downloaded
is a task's dataset and nothing else; no code from the Hub is run.
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
    # A task may name a metric whose code the `evaluate` library fetches from the Hub and runs.
    "HF_EVALUATE_OFFLINE": "1",
    # Resampling would fork this process, with the model and its threads in it, once a core.
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
    """Return what a model reaches in tasks of the harness.

    Args:
        model: on its device; it is put into eval mode.
        tokenizer: the model's own; it stays as it is.
        tasks: names of tasks, groups or tags, or patterns such as `mmlu_*`.
        batch_size: rows in one forward pass; the logits of all their tokens are held in float32.
        limit: only the first rows of each task; None: all.
        num_fewshot: solved examples in each prompt; None, or a task that fixes it at 0: the task's.
        include_path: a directory of further task files (YAML).
        seed: of few-shot examples and sampling; None: those of the harness, as in published tables.

    Returns:
        `<task>/<metric>`, its standard error `<task>/<metric>_stderr` where there is one, and
        `<task>/samples`, the rows measured. A metric behind a filter is `<metric>.<filter>`. What
        is undefined, such as the standard error of one row, is left out.

    Raises:
        UserError: if the extra is not installed, a task is unknown, its dataset cannot be had, or
            a likelihood is not finite.
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
    """Return the harness's tasks and groups with their datasets, for `measure_tasks`.

    Apart from measuring, so that a misspelled name costs seconds and not the loading of a model.

    Raises:
        UserError: as in `run_tasks`, a line for each unknown name.
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
                f"the harness has no task {quote(name)}{suggest(name, known)}; "
                "`lm-eval ls tasks` lists them"
                for name in unknown
            )
        )
    random.seed(seed or 0)  # as the harness does; some tasks shuffle their answers as they load
    loaded: list[Any] = []
    for name in dict.fromkeys(match for matches in found.values() for match in matches):
        try:
            built = manager.load([name])
        except Exception as error:  # of the network, the dataset or the code of the task
            raise UserError(_explain_load(name, error)) from error
        group = built["groups"].get(name)
        loaded += built["tasks"].values() if group is None else [group]
    if not loaded:
        raise UserError("no task was named, or none of those named has rows")
    try:
        leaves = manager.load(loaded)["tasks"]
    except ValueError as error:  # a task that is named twice, as itself and in a group
        raise UserError(f"{one_line(error)}; name it once") from error
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} runs code that the model writes; that is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} asks about images, and the model reads text only")
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
    """Return what `run_tasks` does, for tasks that are loaded; they may be measured repeatedly."""
    prepare_harness()
    check_counts(batch_size=batch_size, limit=limit, num_fewshot=num_fewshot)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    harness_model = wrap_model(model, tokenizer, batch_size)
    kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeds = {} if seed is None else dict.fromkeys(kinds, seed)
    try:
        with redirect_stdout(sys.stderr):  # its notes on progress; stdout is for results
            results = simple_evaluate(
                harness_model,
                tasks=list(tasks),
                # Nothing is left to be found by its name, and an index of all names takes seconds.
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
            "HF_EVALUATE_OFFLINE=0 lets it fetch and run a metric's code"
        ) from error
    except AssertionError as error:  # how the harness says that a request is too long
        raise UserError(
            f"a task does not fit into the model's {harness_model.max_length} positions: "
            f"{one_line(error)}"
        ) from error
    if harness_model.cut:
        print(
            f"lm-eval: {harness_model.cut} of {harness_model.asked} requests were longer than the "
            f"model's {harness_model.max_length} positions and lost their beginning",
            file=sys.stderr,
        )
    return _flatten(results)


def wrap_model(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return the harness's `HFLM` for a loaded model; the model stays where and what it is."""
    from lm_eval.models.huggingface import HFLM

    from gptj8.model.scoring.perplexity import context_length

    class LoadedModel(HFLM):  # type: ignore[misc]
        """Refuses likelihoods that are not finite.

        Attributes:
            asked: likelihoods that tasks asked for.
            cut: those of them whose prompt lost its beginning.
        """

        asked = 0
        cut = 0

        def _loglikelihood_tokens(
            self, requests: list[Any], *args: Any, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            # The last token is predicted and never read.
            longest = self.max_length + 1
            self.asked += len(requests)
            self.cut += sum(len(context) + len(end) > longest for _, context, end in requests)
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
            if not all(math.isfinite(likelihood) for likelihood, _ in answers):
                raise UserError("the model's likelihoods are not finite; try --dtype float32")
            return answers

        def get_model_info(self) -> dict[str, Any]:
            """Return nothing: the harness would ask the Hub for the model's revision."""
            return {}

    return LoadedModel(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),  # the harness gives it a padding token
        batch_size=batch_size,
        max_length=context_length(model.config),
        softmax_dtype="float32",
        trust_remote_code=False,
    )


def prepare_harness() -> None:
    """Import the harness with its own messages off, unless the user has set their level.

    Raises:
        UserError: if it is not installed.
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
            "lm-evaluation-harness is not installed; pip install 'gptj8[harness]'"
        ) from None


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """Return the index of all tasks; 14,000 files are read for it, which takes 7 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _explain_load(name: str, error: BaseException) -> str:
    """Return one line on why a task could not be loaded."""
    reason = one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError) or "httpx" in type(cause).__module__:
            return (
                f"task {name}: its dataset could not be downloaded: {reason}; "
                "it needs a network once, and is then kept in the Hugging Face cache"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ImportError):
        return f"task {name} needs a package that is not installed: {reason}"
    return f"task {name} cannot be loaded: {reason}"


def check_counts(*, batch_size: int, limit: int | None, num_fewshot: int | None) -> None:
    problems = []
    if batch_size < 1:
        problems.append(f"batch size = {batch_size} is less than 1")
    if limit is not None and limit < 1:
        problems.append(f"limit = {limit} is less than 1; leave it out for all rows")
    if num_fewshot is not None and num_fewshot < 0:
        problems.append(f"number of few-shot examples = {num_fewshot} is negative")
    if problems:
        raise UserError("\n".join(problems))


def _flatten(results: dict[str, Any]) -> dict[str, float]:
    """Return the harness's results under names that MLflow takes.

    `acc,none` becomes `acc` and `exact_match,strict-match` becomes `exact_match.strict-match`: a
    slash there would be a metric inside a metric, which MLflow's file store has no place for.
    """
    metrics: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or isinstance(value, bool | str) or not math.isfinite(value):
                continue
            metric += "" if filter_name == "none" else f".{filter_name}"
            metrics[f"{_plain(task)}/{_plain(metric)}"] = float(value)
    for task, counts in results["n-samples"].items():
        metrics[f"{_plain(task)}/samples"] = float(counts["effective"])
    return metrics


def _plain(name: str) -> str:
    return _NOT_IN_A_NAME.sub("_", name).replace("/", "_")


def stderr_name(metric: str) -> str:
    name, dot, filter_name = metric.partition(".")
    return f"{name}_stderr{dot}{filter_name}"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return a model directory's tokenizer, which knows the token that ends a text.

    Raises:
        UserError: if there is none, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    from gptj8.dataset.prepared.prompts import TextEncoder

    eos_id = TextEncoder.load(path).eos_id
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        # The harness would add a padding token of its own, which the embedding has no row for.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    return tokenizer
