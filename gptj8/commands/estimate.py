"""`gptj8 estimate`: estimate the memory of training and evaluation from a model's config.json."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes
from gptj8.runtime.progress import Progress, progress
from gptj8.runtime.tables import format_table

_PEAK = "peak"
_PARTS = 5
_LOG_SECONDS = 5.0
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 estimate`."""
    estimate = commands.add_parser(
        "estimate", help="estimate from config.json whether training fits into memory"
    )
    estimate.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a param, as in dvc exp run",
    )
    estimate.add_argument(
        "--model",
        metavar="DIR_OR_CONFIG",
        help="a model directory or config.json (default: model.path in params.yaml)",
    )
    estimate.add_argument(
        "--memory",
        metavar="SIZE",
        help="available memory, such as 8GB (default: 90 %% of the free memory)",
    )
    estimate.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu"
    )
    estimate.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    estimate.set_defaults(command=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    found = estimate(arguments.model, arguments.memory, arguments.device, arguments.set_param)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines_of(found)))
    if not found["fits"]:
        raise UserError(_explain_misfit(found))


def estimate(
    model: str | None, memory: str | None, device: str | None, overrides: list[str]
) -> dict[str, Any]:
    """Return the output of `gptj8 estimate --json`. Sizes are in bytes.

    Raises:
        UserError: if the params, the model or the memory size are invalid.
    """
    with progress(_PARTS, "estimate", "parts", log_seconds=_LOG_SECONDS) as shown:
        return _in_parts(model, memory, device, overrides, shown)


def _in_parts(
    model: str | None, memory: str | None, device: str | None, overrides: list[str], shown: Progress
) -> dict[str, Any]:
    """Return the estimate and advance `shown` by `_PARTS`."""
    from gptj8.params.sections import load_params

    limit = parse_bytes(memory) if memory is not None else None
    if overrides:
        from gptj8.params.overrides import overridden_params

        params = overridden_params(overrides)
    else:
        params = load_params()

    from gptj8.memory.skeleton import read_config

    config = read_config(model or params.model.path)

    import torch

    from gptj8.memory import measured_speed, process_memory
    from gptj8.memory.estimate import LARGEST_TRIED, Estimator, plan_of
    from gptj8.memory.fitting import USED, choose_fit
    from gptj8.model.loading import pick_device, pick_dtype
    from gptj8.runtime import machine

    place = device or pick_device().type
    if place == "cuda" and not torch.cuda.is_available() and params.model.dtype == "auto":
        dtype = torch.bfloat16
    else:
        dtype = pick_dtype(params.model.dtype, torch.device(place))
    kind = str(dtype).removeprefix("torch.")
    if limit is None:
        limit = int(USED * machine.available_bytes(place))
    measured = measured_speed.read(machine.device_name(place), kind)

    def say(what: str) -> None:
        shown.show(what)
        shown(0)

    shown()
    with ExitStack() as beside:
        known = measured.process_bytes if measured else 0
        process: Callable[[], int] | None = None
        if place == "cpu" and not known:  # it takes as long as the rest, on another core
            process = beside.enter_context(process_memory.measuring_process_memory(kind))
        estimator = Estimator(plan_of(params, config, dtype, place), known, say)
        shown()
        if process is not None:
            estimator.training(1)  # needed below; recorded while the process runs
            say("memory of the libraries")
            estimator.process = process()
    shown()
    finetune = params.finetune
    fit = choose_fit(estimator, finetune, limit)
    shown()
    largest = estimator.largest_micro_batch(limit)
    training = estimator.training(fit.micro_batch, fit.checkpointing)
    evaluation = estimator.evaluation()
    per_token = estimator.flops_per_token(fit.checkpointing)
    shown()
    plan, weights = estimator.plan, estimator.weights
    return {
        "model_type": config.model_type,
        "device": place,
        "dtype": kind,
        "max_length": plan.length,
        "trainable_parameters": weights.trained,
        "training": {
            "per_device_train_batch_size": fit.micro_batch,
            "gradient_accumulation_steps": finetune.sequences_per_step // fit.micro_batch,
            "checkpointing": fit.checkpointing,
            "components": training.components,
            _PEAK: training.total,
        },
        "evaluation": {"components": evaluation.components, _PEAK: evaluation.total},
        "memory": limit,
        "fits": max(training.total, evaluation.total) <= limit,
        "largest_per_device_train_batch_size": largest,
        "largest_tried": LARGEST_TRIED,
        "flops_per_token": per_token,
        "tokens_per_second": measured.flops_per_second / per_token if measured else None,
    }


def _explain_misfit(found: dict[str, Any]) -> str:
    """Return one line that says what does not fit, and the way out."""
    training, evaluation = found["training"], found["evaluation"]
    largest, tokens = found["largest_per_device_train_batch_size"], found["max_length"]
    needs = [
        f"{name} needs {format_bytes(part[_PEAK])}"
        for name, part in (("training", training), ("evaluation", evaluation))
        if part[_PEAK] > found["memory"]
    ]
    way = "lower data.max_length, or use a smaller model or more memory"
    if training[_PEAK] > found["memory"] and largest:
        way = f"set finetune.per_device_train_batch_size to {largest} or less, or to auto" + (
            ", and lower data.max_length for the evaluation" if len(needs) > 1 else ""
        )
    return (
        f"{' and '.join(needs)} with {tokens} tokens per row, but only "
        f"{format_bytes(found['memory'])} are available; {way}"
    )


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return the estimate as lines of text."""
    training, evaluation = found["training"], found["evaluation"]
    names = list(dict.fromkeys([*training["components"], *evaluation["components"]]))
    names = [n for n in names if any(part["components"].get(n) for part in (training, evaluation))]
    rows, length = training["per_device_train_batch_size"], found["max_length"]
    lines = [
        f"{found['model_type']}, {found['dtype']} on {found['device']}, "
        f"{found['trainable_parameters']:,} trainable weights, "
        f"micro-batch of {rows} x {length} tokens, checkpointing {training['checkpointing']}",
        "",
    ]
    table = []
    for name in [*names, _PEAK]:
        if name == _PEAK:
            sizes = [training[_PEAK], evaluation[_PEAK]]
        else:
            sizes = [part["components"].get(name, 0) for part in (training, evaluation)]
        table.append([name, *(f"{size / 2**30:.3f}" if size else "" for size in sizes)])
    lines += [f"  {line}" for line in format_table(table, ["GiB", "training", "evaluation"])]
    memory = format_bytes(found["memory"])
    largest, tried = found["largest_per_device_train_batch_size"], found["largest_tried"]
    shown = f"at least {largest:,}; larger ones were not tried" if largest == tried else largest
    verdict = "fits into" if found["fits"] else "does not fit into"
    lines += ["", f"  {verdict} {memory}; "]
    lines[-1] += (
        f"the largest per_device_train_batch_size that fits is {shown}"
        if largest
        else "not even a micro-batch of one sequence fits"
    )
    speed = found["tokens_per_second"]
    lines.append(
        "  training tokens per second: "
        + (
            f"about {speed:,.0f}, from the speed of the last run on this device"
            if speed
            else "not calibrated; run the finetune stage on this device"
        )
    )
    return lines


def parse_bytes(text: str) -> int:
    """Parse a size such as `8GB` (units of 10^9), `7.5GiB` (units of 2^30) or a number of bytes.

    Raises:
        UserError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise UserError(f"--memory {text}: not a size; write it like 8GB or 7.5GiB")
    unit = match[2].upper()
    base = 1 if not unit else (1024 if match[3] else 1000)
    size = int(float(match[1]) * base ** _UNITS[unit])
    if size <= 0:
        raise UserError(f"--memory {text}: must be greater than 0, such as 8GB")
    return size
