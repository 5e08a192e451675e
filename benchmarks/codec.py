"""Measure error and time of the codebooks: `python -m benchmarks.codec [MODEL]`.

Prints the relative RMS error at block size 4096 on random weights of three distributions and, if a
model directory is given, on each of its matrices. Also prints the quantization time of the fitted
relative to the dynamic codebook, as the median of interleaved runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from torch.distributions import Distribution, Laplace, Normal, StudentT

from gptj8.quantization.codec import quantize_blockwise, squared_errors
from gptj8.quantization.shards import ShardedWeights

BLOCK_SIZE = 4096
DISTRIBUTIONS: dict[str, Distribution] = {
    "normal": Normal(0.0, 1.0),
    "Laplace": Laplace(0.0, 1.0),
    "Student t, 4 degrees": StudentT(4.0),
}


def relative_rmse(weight: torch.Tensor, codebook: str) -> float:
    """Return |restored - weight| / |weight|."""
    error, norm = squared_errors(weight, quantize_blockwise(weight, BLOCK_SIZE, codebook))
    return math.sqrt(error / norm)


def seconds(weight: torch.Tensor, runs: int) -> dict[str, float]:
    """Return the median quantization time in seconds per codebook over interleaved runs."""
    times: dict[str, list[float]] = {"dynamic": [], "fitted": []}
    for _ in range(runs):
        for codebook, taken in times.items():
            started = time.perf_counter()
            quantize_blockwise(weight, BLOCK_SIZE, codebook)
            taken.append(time.perf_counter() - started)
    return {codebook: statistics.median(taken) for codebook, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory with trained weights")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("| weights | dynamic | fitted | ratio |\n|---|---|---|---|")
    for name, distribution in DISTRIBUTIONS.items():
        report(name, distribution.sample((4096, 4096)))
    if arguments.model:
        for name, tensor in ShardedWeights(arguments.model):
            if tensor.dim() == 2:
                report(f"`{name}`", tensor)
    taken = seconds(Normal(0.0, 1.0).sample((4096, 4096)), arguments.runs)
    print(f"\ntime of fitted / dynamic: {taken['fitted'] / taken['dynamic']:.2f}")
    print(f"million weights per second, fitted: {4096**2 / taken['fitted'] / 1e6:.0f}")


def report(name: str, weight: torch.Tensor) -> None:
    """Print one row of the table."""
    dynamic, fitted = relative_rmse(weight, "dynamic"), relative_rmse(weight, "fitted")
    print(f"| {name} | {dynamic:.3%} | {fitted:.3%} | {fitted / dynamic:.2f} |", flush=True)


if __name__ == "__main__":
    main()
