"""`gptj8 estimate`: what training and evaluation will take, before anything is downloaded."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes

_SHOWN = "peak"
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 estimate` to the command line."""
    estimate = commands.add_parser(
        "estimate", help="tell from a model's config.json whether training it will fit"
    )
    estimate.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a param, as in dvc exp run",
    )
    estimate.add_argument(
        "--model",
        metavar="DIR_OR_CONFIG",
        help="a model directory or config.json (default: model.path of params.yaml)",
    )
    estimate.add_argument(
        "--memory",
        metavar="SIZE",
        help="to fit into, such as 8GB (default: nine tenths of what is free here)",
    )
    estimate.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one, else the CPU"
    )
    estimate.add_argument("--json", action="store_true", help="print bytes as JSON, for scripts")
    estimate.set_defaults(command=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    found = estimate(arguments.model, arguments.memory, arguments.device, arguments.set_param)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines_of(found)))


def estimate(
    model: str | None, memory: str | None, device: str | None, overrides: list[str]
) -> dict[str, Any]:
    """Return what `gptj8 estimate --json` prints; sizes are bytes.

    Raises:
        UserError: for params, a model or a size that cannot be used.
    """
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
    from gptj8.memory.estimate import Estimator, plan_of
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
    process = 0
    if place == "cpu":
        process = measured.process_bytes if measured else 0
        process = process or process_memory.measure_process_memory_in_new_process(kind)
    estimator = Estimator(plan_of(params, config, dtype, place), process)
    finetune = params.finetune
    largest = estimator.largest_micro_batch(limit)
    fit = choose_fit(estimator, finetune, limit)
    training = estimator.training(fit.micro_batch, fit.checkpointing)
    evaluation = estimator.evaluation()
    per_token = estimator.flops_per_token(fit.checkpointing)
    plan, weights = estimator.plan, estimator.weights
    return {
        "model_type": config.model_type,
        "device": place,
        "dtype": kind,
        "max_length": plan.length,
        "trainable_parameters": weights.trained,
        "training": {
            "per_device_train_batch_size": fit.micro_batch,
            "gradient_accumulation_steps": finetune.sequences_a_step // fit.micro_batch,
            "checkpointing": fit.checkpointing,
            "components": training.components,
            _SHOWN: training.total,
        },
        "evaluation": {"components": evaluation.components, _SHOWN: evaluation.total},
        "memory": limit,
        "fits": max(training.total, evaluation.total) <= limit,
        "largest_per_device_train_batch_size": largest,
        "flops_per_token": per_token,
        "tokens_per_second": measured.flops_per_second / per_token if measured else None,
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return the estimate for the terminal."""
    training, evaluation = found["training"], found["evaluation"]
    names = list(dict.fromkeys([*training["components"], *evaluation["components"]]))
    names = [n for n in names if any(part["components"].get(n) for part in (training, evaluation))]
    width = max(map(len, names))
    rows, length = training["per_device_train_batch_size"], found["max_length"]
    lines = [
        f"{found['model_type']}, {found['dtype']} on {found['device']}, "
        f"{found['trainable_parameters']:,} weights to train, "
        f"{rows} x {length} tokens at a time, checkpointing {training['checkpointing']}",
        "",
        f"  {'GiB':<{width}}  {'training':>10}  {'evaluation':>10}",
    ]
    for name in [*names, _SHOWN]:
        if name == _SHOWN:
            sizes = [training[_SHOWN], evaluation[_SHOWN]]
        else:
            sizes = [part["components"].get(name, 0) for part in (training, evaluation)]
        shown = "  ".join(f"{size / 2**30:>10.3f}" if size else " " * 10 for size in sizes)
        lines.append(f"  {name:<{width}}  {shown}".rstrip())
    memory = format_bytes(found["memory"])
    largest = found["largest_per_device_train_batch_size"]
    verdict = "fits into" if found["fits"] else "does not fit into"
    lines += ["", f"  {verdict} {memory}; "]
    lines[-1] += (
        f"the largest per_device_train_batch_size that does: {largest}"
        if largest
        else "not even one sequence at a time does"
    )
    speed = found["tokens_per_second"]
    lines.append(
        "  training tokens a second: "
        + (
            f"about {speed:,.0f}, as fast as the last run here computed"
            if speed
            else "not calibrated; a run of the finetune stage on this device does that"
        )
    )
    return lines


def parse_bytes(text: str) -> int:
    """Return how many bytes `8GB` (10^9 each), `7.5GiB` (2^30) or a plain number are.

    Raises:
        UserError: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise UserError(f"--memory {text}: a size is written like 8GB or 7.5GiB")
    unit = match[2].upper()
    base = 1 if not unit else (1024 if match[3] else 1000)
    size = int(float(match[1]) * base ** _UNITS[unit])
    if size <= 0:
        raise UserError(f"--memory {text}: must be more than nothing, such as 8GB")
    return size
