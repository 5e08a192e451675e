"""Do experiments get slower or larger in a row? `python -m benchmarks.experiments [30]`.

Run it in a project with results (`make repro`, or a small clone of it). Each experiment is `dvc exp
run -S seed=N`, so it trains another adapter, evaluates, exports and records it. Prints a row of
Markdown after each: seconds, what grew in DVC's cache, MLflow's database and artifacts and gptj8's
state, and how many copies of the adapter's weights MLflow got. The last lines compare the medians
of the first and the last third. The workspace is left at the last experiment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PLACES = {
    "DVC's cache": (".dvc/cache",),
    "MLflow's database": ("mlflow.db",),
    "MLflow's artifacts": ("mlartifacts",),
    "gptj8's state": (".gptj8", ".dvc/tmp"),
}
_WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    """Run the experiments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("count", nargs="?", type=int, default=30, help="default: 30")
    count = parser.parse_args().count
    print("| experiment | s |", " | ".join(f"{place}, KB" for place in PLACES), "| copies |")
    print("|---" * (len(PLACES) + 3) + "|", flush=True)
    seconds, growth = [], {place: [] for place in PLACES}
    for number in range(1, count + 1):
        before, copies = sizes(), weights()
        begun = time.monotonic()
        run_experiment(number)
        seconds.append(time.monotonic() - begun)
        for place, size in sizes().items():
            growth[place].append((size - before[place]) / 1000)
        cells = [f"{growth[place][-1]:,.0f}" for place in PLACES]
        cells = [str(number), f"{seconds[-1]:.1f}", *cells, str(weights() - copies)]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nseconds: {thirds(seconds)}")
    for place, values in growth.items():
        print(f"{place}, KB an experiment: {thirds(values)}")


def run_experiment(seed: int) -> None:
    """Run one experiment; stop the benchmark with DVC's output if it fails."""
    command = [sys.executable, "-m", "dvc", "exp", "run", "-S", f"seed={seed}"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(f"experiment {seed} failed:\n{process.stdout}{process.stderr}")


def sizes() -> dict[str, int]:
    """Return the bytes on disk of each place; a file with several names counts once."""
    return {place: sum(map(_bytes_of, map(Path, paths))) for place, paths in PLACES.items()}


def weights() -> int:
    """Return how many files with an adapter's weights MLflow's artifacts have."""
    return sum(1 for _ in Path("mlartifacts").rglob(_WEIGHTS))


def thirds(values: Sequence[float]) -> str:
    """Return the medians of the first and of the last third of some measurements."""
    third = max(1, len(values) // 3)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return f"{first:,.1f} in the first third, {last:,.1f} in the last"


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    found = {}
    for file in files:
        stat = os.lstat(file)
        found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


if __name__ == "__main__":
    main()
