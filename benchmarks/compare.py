"""Compare methods by speed and memory: `python -m benchmarks.compare [--layers 2] [--rounds 3]`.

The model is a GPT-J with full width, few layers and random weights, LoRA of rank 8 on query and
value, and activation checkpointing. It runs on this machine's GPU, or on its CPU if there is no GPU
or CUDA_VISIBLE_DEVICES= hides it. All methods (`benchmarks.methods`) get the same shape, tokens and
adapters. Each method runs in its own process, alternating with the others; figures are medians over
rounds. Prints Markdown with ratios to bfloat16 first, and writes JSON.

A final round measures the deviation of logits and gradients from float32 and the loading time. It
briefly needs 20 GB of memory, and 2.5 GB of disk; `--speed-only` skips it.

`--scaling` measures only training, for gptj8 and bfloat16, with growing numbers of tokens, layers
and threads, and prints each figure immediately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import BASE, METHODS
from gptj8.runtime.process import prepare_to_compute

TRAINING_TOKENS = (32, 128, 512, 2048)
# Tokens, layers and threads; only one of them varies per line.
SCALING = (
    *((tokens, 2, 2) for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
    *((512, layers, 2) for layers in (4, 8, 28)),
    (512, 2, 1),
)

Figures = dict[str, dict[str, list[float | str]]]


def measure(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Measure one part of one method in this process."""
    prepare_to_compute()  # for all methods, because they all benefit equally
    import torch

    from benchmarks import measures
    from gptj8.model.loading import pick_device

    device = pick_device()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    method, layers = arguments.method, arguments.layers
    if arguments.part == "deviation":
        return measures.deviation(method, layers, device)
    if arguments.part == "loading":
        folder = arguments.folder
        return measures.loading(method, folder / "original", folder / "8bit", device)
    return measures.speed(method, layers, arguments.tokens, arguments.trains_only, device)


def run(method: str, layers: int, *options: str) -> dict[str, Any]:
    """Measure one part of one method in a separate process."""
    command = [sys.executable, "-m", "benchmarks.compare", "--method", method, *options]
    process = subprocess.run([*command, "--layers", str(layers)], capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return {f"process failed: {' '.join(options[:2])}": reason[0][:100]}
    return json.loads(process.stdout.splitlines()[-1])


def table(figures: Figures) -> list[str]:
    """Return a Markdown table with one column per method and ratios to bfloat16 first."""
    medians: dict[str, dict[str, float | str]] = {}
    for method, rows in figures.items():
        for name, values in rows.items():
            numbers = [v for v in values if isinstance(v, float)]
            value = statistics.median(numbers) if numbers else values[0]
            medians.setdefault(name, {})[method] = value
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name, row in medians.items():
        cells = []
        for method in figures:
            value, base = row.get(method, ""), row.get(BASE)
            if isinstance(value, float) and isinstance(base, float) and base:
                cells.append(f"{value / base:.2f}x ({value:,.3g})")
            else:
                cells.append(str(value) if isinstance(value, str) else f"{value:,.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def scale(rounds: int, figures: Figures) -> None:
    """Add training tokens per second for growing numbers of tokens, layers and threads."""
    for number in range(rounds):
        for tokens, layers, threads in SCALING:
            for method in figures:
                where = f"{tokens:,} tokens, {layers} layers, {threads} threads"
                _log(f"round {number + 1}: {method}, {where}")
                options = ["--trains-only", "--tokens", str(tokens), "--threads", str(threads)]
                found = run(method, layers, *options)
                figure = found.get(f"training, {tokens} tokens", "fails")
                figures[method].setdefault(where, []).append(figure)
                _log(f"  {figure}")


def compare(arguments: argparse.Namespace, machine: str, figures: Figures) -> None:
    """Add the measurements of each method."""
    layers = arguments.layers
    arguments.json.parent.mkdir(parents=True, exist_ok=True)

    def add(title: str, method: str, *options: str) -> None:
        _log(f"{title}: {method}")
        for name, value in run(method, layers, *options).items():
            figures[method].setdefault(name, []).append(value)
        # Write after each measurement, so that an interrupted run keeps its results.
        content = {"machine": machine, "layers": layers, "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=2))

    tokens = ["--tokens", *map(str, arguments.tokens)]
    for number in range(arguments.rounds):
        for method in figures:
            add(f"round {number + 1}", method, *tokens)
    if arguments.speed_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder), layers)
        for method in figures:
            add("deviation", method, "--part", "deviation")
            add("loading", method, "--part", "loading", "--folder", folder)


def _save(folder: Path, layers: int) -> None:
    from benchmarks.measures import save_original
    from gptj8 import Blockwise8bitConfig, convert_checkpoint

    save_original(folder / "original", layers)
    convert_checkpoint(folder / "original", folder / "8bit", Blockwise8bitConfig())


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=TRAINING_TOKENS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trains-only", action="store_true")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("reports/benchmarks/compare.json"))
    one = parser.add_argument_group("one measurement, printed as JSON")
    one.add_argument("--method", choices=METHODS)
    one.add_argument("--part", choices=("speed", "deviation", "loading"), default="speed")
    one.add_argument("--folder", type=Path)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    if arguments.method:
        print(json.dumps(measure(arguments)))
        return
    import torch

    from gptj8.model.loading import pick_device
    from gptj8.runtime.machine import device_name

    machine = f"{device_name(pick_device().type)}, torch {torch.__version__}"
    if arguments.scaling:
        what = "training"
        figures: Figures = {"gptj8": {}, BASE: {}}
        scale(arguments.rounds, figures)
    else:
        what = f"{arguments.layers} layers"
        figures = {method: {} for method in arguments.methods}
        compare(arguments, machine, figures)
    print(f"GPT-J of width 4096, {what}; {machine}; tokens per second\n")
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
