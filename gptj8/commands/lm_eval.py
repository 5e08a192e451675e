"""`gptj8 lm-eval`: run standard benchmarks. Large packages are imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.evaluation.harness import (
    check_counts,
    load_tasks,
    load_tokenizer,
    measure_tasks,
    prepare_harness,
    stderr_name,
)
from gptj8.runtime.errors import UserError
from gptj8.runtime.project import BASE
from gptj8.runtime.tables import format_table

if TYPE_CHECKING:
    from gptj8.evaluation.harness import Model


def table_lines(measured: dict[str, dict[str, float]]) -> list[str]:
    """Return a text table with one row per metric, one column per model and cells `value ± error`.

    Args:
        measured: the metrics of each model, as returned by `measure_tasks`.
    """
    models = list(measured)
    rows = []
    for key in dict.fromkeys(key for metrics in measured.values() for key in metrics):
        task, _, metric = key.partition("/")
        name, _, _ = metric.partition(".")
        if metric == "samples" or name.endswith("_stderr"):
            continue
        error = f"{task}/{stderr_name(metric)}"
        rows.append(
            [
                task,
                metric,
                *(_with_error(measured[m].get(key), measured[m].get(error)) for m in models),
            ]
        )
    table = format_table(rows, ["task", "metric", *models], align="l")
    return [f"  {line}" for line in table]


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 lm-eval`, which evaluates the 8-bit model and, given an adapter, the tuned one."""
    parser = commands.add_parser(
        "lm-eval", help="run standard benchmarks with EleutherAI's lm-evaluation-harness"
    )
    parser.add_argument(
        "--tasks", required=True, help="comma-separated names, such as hellaswag,arc_easy"
    )
    parser.add_argument("--model", default=str(BASE), help="default: %(default)s")
    parser.add_argument("--adapter", help="also evaluate the model with this adapter")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="data type for computation (default: auto)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows per forward pass (default: 8)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N rows of each task"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="K", help="few-shot examples (default: the task's)"
    )
    parser.add_argument("--include-path", metavar="DIR", help="directory of more task files (YAML)")
    parser.add_argument(
        "--output",
        default="reports/harness/metrics.json",
        help="metrics file (default: reports/harness/metrics.json)",
    )
    parser.set_defaults(command=_lm_eval, computes=True)


def _lm_eval(arguments: argparse.Namespace) -> None:
    # Check the arguments, including the adapter, before the hours of evaluating the 8-bit model.
    check_counts(
        batch_size=arguments.batch_size, limit=arguments.limit, num_fewshot=arguments.num_fewshot
    )
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if arguments.adapter and not (Path(arguments.adapter) / "adapter_config.json").is_file():
        raise UserError(f"{arguments.adapter} has no adapter_config.json; is it an adapter?")
    if not sys.stderr.isatty():
        # In a log every refresh of a bar adds a line, so refresh only every 30 s and show no bar
        # for shorter work. tqdm reads these variables when it is imported, which is below.
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("TQDM_DELAY", "30")
    prepare_harness()

    import torch

    from gptj8.model.loading import load_adapter, load_model, pick_device, pick_dtype
    from gptj8.runtime.files import write_json

    tokenizer = load_tokenizer(arguments.model)
    tasks = load_tasks(names, arguments.include_path)
    device = pick_device()
    model = load_model(arguments.model, pick_dtype(arguments.dtype, device), device)
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    measured: dict[str, dict[str, float]] = {}

    def measure(name: str, description: str, model: Model) -> None:
        print(f"lm-eval: {description}", file=sys.stderr)
        try:
            measured[name] = measure_tasks(
                model,
                tokenizer,
                tasks,
                batch_size=arguments.batch_size,
                limit=arguments.limit,
                num_fewshot=arguments.num_fewshot,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch-size {arguments.batch_size}: out of GPU memory; lower it"
            ) from None

    measure("quantized" if is_quantized else "base", arguments.model, model)
    if arguments.adapter:
        tuned = load_adapter(model, arguments.adapter)
        measure("tuned", f"{arguments.model} with {arguments.adapter}", tuned)
    write_json(
        arguments.output,
        {
            f"{name}/{key}": value
            for name, found in measured.items()
            for key, value in found.items()
        },
    )
    print("\n".join(table_lines(measured)))
    print(f"\n  all metrics: {arguments.output}")
