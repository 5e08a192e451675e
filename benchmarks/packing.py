"""Measure what `finetune.packing` gains: tokens per second of forward and backward on short rows.

Each micro-batch of the training order (rows of similar length) is timed padded and packed, one
after the other, with the order alternating, so that both see the same machine. The speed is the
median over micro-batches, and the gain the median of the paired ratios.

python -m benchmarks.packing data/models/tiny-gptj/model data/models/smollm2-135m/model
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gptj8
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model, pick_arithmetic
from gptj8.runtime.machine import device_name
from gptj8.training.activation_checkpointing import set_checkpointing
from gptj8.training.batches import Collator, RowOrder
from gptj8.training.loss import summed_loss
from gptj8.training.packing import PackedCollator, require_packable

SPREADS = {"40 +- 10": (40, 10), "40 +- 25": (40, 25), "exactly 40": (40, 0)}
"""Mean and standard deviation of the lengths."""

WARM_UP = 3  # micro-batches

Batch = dict[str, torch.Tensor]


def rows(mean: float, deviation: float, count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Return rows whose second half is learned."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(mean, deviation, count).round().astype(int), 4, 4 * int(mean))
    return [
        {
            "input_ids": draw.integers(0, vocabulary, n).tolist(),
            "learned": [int(n) // 2, int(n)],
            "length": int(n),
        }
        for n in lengths
    ]


def measure(
    step: Callable[[Batch], None],
    collators: Sequence[Callable[[Any], Batch]],
    batches: Iterator[list[dict[str, Any]]],
    count: int,
) -> dict[str, float]:
    """Return the speed with each collator, the gain, and the share of padding."""
    speeds: list[list[float]] = [[], []]
    positions, used = [0, 0], 0
    for number in range(-WARM_UP, count):
        examples = next(batches)
        tokens = sum(example["length"] for example in examples)
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            batch = collators[which](examples)
            step(batch)
            seconds = time.perf_counter() - started
            if number >= 0:
                speeds[which].append(tokens / seconds)
                positions[which] += batch["input_ids"].numel()
        used += tokens if number >= 0 else 0
    padded, packed = speeds
    return {
        "padded": statistics.median(padded),
        "packed": statistics.median(packed),
        "gain": statistics.median(b / a for a, b in zip(padded, packed, strict=True)),
        "padding": 1 - used / positions[0],
        "padding, packed": 1 - used / positions[1],
    }


def endless(examples: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield complete micro-batches in the order of training, epoch by epoch."""
    order, epoch = RowOrder(examples, size, seed=0), 0
    while True:
        numbers = order.of(epoch)
        shuffled = np.random.default_rng(epoch).permutation(len(numbers) // size)
        for start in shuffled * size:
            yield [examples[n] for n in numbers[start : start + size]]
        epoch += 1


def main() -> None:
    """Print a table for each model directory on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--batches", type=int, default=40, help="timed micro-batches")
    options = parser.parse_args()
    device, dtype = pick_arithmetic("auto")
    print(f"{device_name(device.type)}, {torch.get_num_threads()} threads, {dtype}")
    print("model | lengths | rows | padded tok/s | packed tok/s | gain | padding | packed")
    for source in options.models:
        with tempfile.TemporaryDirectory() as folder:
            gptj8.convert_checkpoint(source, Path(folder) / "base", gptj8.Blockwise8bitConfig())
            torch.manual_seed(0)
            model = add_adapter(load_model(Path(folder) / "base", dtype, device), AdapterSpec())
            model.config.use_cache = False
            require_packable(model)
            set_checkpointing(model.train(), "none")

            def step(batch: Batch, model: Any = model) -> None:
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                total, learned, _ = summed_loss(model, inputs)
                (total / learned).backward()
                model.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()

            collators = (Collator(0, model), PackedCollator(0, model))
            for spread, (mean, deviation) in SPREADS.items():
                for size in options.sizes:
                    examples = rows(mean, deviation, 1024, model.config.vocab_size)
                    found = measure(step, collators, endless(examples, size), options.batches)
                    print(
                        f"{source.parent.name} | {spread} | {size} | {found['padded']:,.0f} | "
                        f"{found['packed']:,.0f} | {found['gain']:.2f}x | {found['padding']:.0%} | "
                        f"{found['padding, packed']:.0%}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
