"""Speed and memory beside other methods: `python -m benchmarks.compare [--layers 2] [--rounds 3]`.

One GPT-J of full width and few layers, random weights, LoRA of rank 8 on query and value, gradient
checkpointing, on this machine's CPU; every method (`benchmarks.methods`) gets the same shape,
tokens and adapters. A method runs in a process of its own, in turns with the others; figures are
medians over rounds. Prints Markdown, ratios to bfloat16 first, and writes JSON.

`--scaling` measures training alone, of gptj8 and bfloat16, as tokens, layers and threads grow, and
prints each figure as it comes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptj8.runtime import (
    cpu_name,
    peak_memory_gib,
    reset_peak_memory,
    set_defaults,
    tame_the_heap,
)

METHODS = (
    "gptj8",
    "gptj8-selective",
    "bfloat16",
    "jit-bitsandbytes",
    "llm-int8",
    "nf4",
    "torchao",
)
TRAINING_TOKENS = (32, 128, 512, 2048)
PREFILL_TOKENS = 512
NEW_TOKENS = 16
# Tokens, layers and threads: one grows at a time.
SCALING = (
    *((tokens, 2, 2) for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
    *((512, layers, 2) for layers in (4, 8, 28)),
    (512, 2, 1),
)
_BASE = "bfloat16"

Figures = dict[str, dict[str, list[float | str]]]


def measure(method: str, layers: int, tokens: Sequence[int], trains_only: bool) -> dict[str, Any]:
    """Return tokens a second of each kind of work, or why it does not run."""
    import torch

    from benchmarks.methods import build, training_loss

    model: Any
    model, seconds = build(method, layers)
    results: dict[str, float | str] = {} if method == _BASE else {"conversion, seconds": seconds}
    reset_peak_memory()  # of both kinds of weights together

    def attempt(name: str, count: int, work: Callable[[], Any]) -> None:
        try:
            work()
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
            results[name] = count / statistics.median(seconds)
        except Exception as error:
            results[name] = f"fails: {type(error).__name__}"

    model.train()
    for length in tokens:
        ids = torch.randint(0, 50257, (1, length))

        def step(ids: torch.Tensor = ids) -> None:
            training_loss(method, model, ids).backward()
            model.zero_grad()

        attempt(f"training, {length} tokens", length, step)
    results["peak memory of training, GiB"] = peak_memory_gib()
    if trains_only:
        return results
    model.eval()
    with torch.inference_mode():
        ids = torch.randint(0, 50257, (1, PREFILL_TOKENS))
        attempt(f"prefill, {PREFILL_TOKENS} tokens", PREFILL_TOKENS, lambda: model(input_ids=ids))
        for batch in (1, 8):
            prompts = torch.randint(0, 50257, (batch, 8))
            generate = functools.partial(
                model.generate,
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                use_cache=True,
                do_sample=False,
                pad_token_id=50256,
            )
            attempt(f"decode, batch {batch}", batch * NEW_TOKENS, generate)
            static = functools.partial(generate, cache_implementation="static")
            attempt(f"decode, batch {batch}, static cache", batch * NEW_TOKENS, static)
    return results


def run(method: str, layers: int, tokens: Sequence[int], *options: str) -> dict[str, Any]:
    """Measure one method in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compare", "--method", method, *options]
    command += ["--layers", str(layers), "--tokens", *map(str, tokens)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
        return {"as a whole": reason[0][:100]}
    return json.loads(process.stdout.splitlines()[-1])


def table(figures: Figures) -> list[str]:
    """Return Markdown: one row a kind of work, one column a method, ratio to bfloat16 first."""
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
            value, base = row.get(method, ""), row.get(_BASE)
            if isinstance(value, float) and isinstance(base, float) and base:
                cells.append(f"{value / base:.2f}x ({value:,.3g})")
            else:
                cells.append(str(value) if isinstance(value, str) else f"{value:,.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def scale(rounds: int, figures: Figures) -> None:
    """Add training tokens a second of two methods as tokens, layers and threads grow."""
    for number in range(rounds):
        for tokens, layers, threads in SCALING:
            for method in ("gptj8", _BASE):
                where = f"{tokens:,} tokens, {layers} layers, {threads} threads"
                print(f"round {number + 1}: {method}, {where}", file=sys.stderr, flush=True)
                found = run(method, layers, [tokens], "--trains-only", "--threads", str(threads))
                speed = found.get(f"training, {tokens} tokens", "fails")
                figures[method].setdefault(where, []).append(speed)
                print(f"  {speed}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, help="measure one here and print JSON")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=TRAINING_TOKENS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trains-only", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("reports/benchmarks/compare.json"))
    arguments = parser.parse_args()
    if arguments.method:
        tame_the_heap()  # for all methods: theirs gain as much by it
        set_defaults()
        import torch

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        only = arguments.trains_only
        results = measure(arguments.method, arguments.layers, arguments.tokens, only)
        print(json.dumps(results))
        return
    import torch

    machine = f"{cpu_name()}, {torch.get_num_threads()} cores, torch {torch.__version__}"
    figures: Figures
    if arguments.scaling:
        figures = {"gptj8": {}, _BASE: {}}
        scale(arguments.rounds, figures)
        print(f"GPT-J of width 4096, training; {machine}; tokens a second\n")
        print("\n".join(table(figures)))
        return
    figures = {method: {} for method in arguments.methods}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        for method in arguments.methods:
            print(f"round {number + 1}: {method}", file=sys.stderr, flush=True)
            for name, value in run(method, arguments.layers, arguments.tokens).items():
                figures[method].setdefault(name, []).append(value)
            # After each, so that a run that is ended early keeps what it measured.
            content = {"machine": machine, "layers": arguments.layers, "figures": figures}
            arguments.json.write_text(json.dumps(content, indent=2))
    print(f"GPT-J of width 4096, {arguments.layers} layers; {machine}; tokens a second\n")
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
