"""`gptj8 lm-eval`: standard benchmarks at the terminal. What is heavy is imported as it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
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

if TYPE_CHECKING:
    from gptj8.evaluation.harness import Model


def table_lines(measured: dict[str, dict[str, float]]) -> list[str]:
    """Return a table for the terminal: a row a metric, a column a model, `value ± error`.

    Args:
        measured: model -> what `run_tasks` returns.
    """
    models = list(measured)
    rows = [["task", "metric", *models]]
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
    return _aligned(rows)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 lm-eval`, which measures the 8-bit model and, with its adapter, the tuned one."""
    parser = commands.add_parser(
        "lm-eval", help="measure standard benchmarks with EleutherAI's harness"
    )
    parser.add_argument(
        "--tasks", required=True, help="names, with commas between, such as hellaswag,arc_easy"
    )
    parser.add_argument(
        "--model", default="artifacts/base-8bit", help="default: artifacts/base-8bit"
    )
    parser.add_argument("--adapter", help="measure the model with this adapter as well")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the arithmetic (default: auto)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows in one forward pass (default: 8)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="K", help="solved examples (default: the task's)"
    )
    parser.add_argument("--include-path", metavar="DIR", help="further task files (YAML)")
    parser.add_argument(
        "--output",
        default="reports/harness/metrics.json",
        help="default: reports/harness/metrics.json",
    )
    parser.set_defaults(command=_lm_eval, computes=True)


def _lm_eval(arguments: argparse.Namespace) -> None:
    # What can be refused is refused before a model is loaded, and the tuned model's faults before
    # the 8-bit one has been measured for hours.
    check_counts(
        batch_size=arguments.batch_size, limit=arguments.limit, num_fewshot=arguments.num_fewshot
    )
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if arguments.adapter and not (Path(arguments.adapter) / "adapter_config.json").is_file():
        raise UserError(f"{arguments.adapter} has no adapter_config.json; is it an adapter?")
    if not sys.stderr.isatty():
        # In a log every refresh of a bar is one more line: a line every half minute, and none for
        # what is done sooner. tqdm reads this as it is imported, which is below.
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
                f"out of GPU memory at --batch-size {arguments.batch_size}; lower it"
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
    print(f"\n  all figures: {arguments.output}")
