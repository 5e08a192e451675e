"""Measure restoring 67 million weights against bitsandbytes: `python -m benchmarks.restoring`.

A matrix of 16384 x 4096 is restored from 8-bit codes to a floating-point dtype, by gptj8 and by
bitsandbytes' `dequantize_blockwise`, in turns. Both allocate their result, and malloc gives them
memory that the process already has, so that no time goes into new pages. Blocks of 64 have 8-bit
scales in gptj8, as in its default format; all other scales are float32. Prints the median
milliseconds and the median ratio of the rounds.

`--isa` restricts gptj8; bitsandbytes picks its code by CPUID alone, which the output says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.opponents import OPPONENTS
from benchmarks.opponents.isa import ISAS, environment

SHAPE = (16384, 4096)
SCALE_BITS = {64: 8, 4096: 32}  # block size -> bits
_KEEP_MEMORY = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}"


def measure(
    dtype_name: str, block_size: int, rounds: int, shape: tuple[int, int] = SHAPE
) -> dict[str, list[float]]:
    """Return the seconds of each round for gptj8 and bitsandbytes."""
    import torch
    from bitsandbytes.functional import create_dynamic_map

    from gptj8.kernels import dispatch
    from gptj8.quantization.codec import quantize_blockwise

    dtype = getattr(torch, dtype_name)
    weight = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0))
    ours = quantize_blockwise(weight, block_size, scale_bits=SCALE_BITS[block_size])
    code = create_dynamic_map().float()
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(weight, code, block_size)
    del weight

    def restore() -> None:
        dispatch.dequantize(
            ours.codes, ours.absmax, ours.codebook, block_size, dtype, levels=ours.levels
        )

    def bitsandbytes() -> None:
        torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, block_size, dtype)

    works: dict[str, Callable[[], None]] = {"gptj8": restore, "bitsandbytes": bitsandbytes}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Restart with the ISA's environment if necessary, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=ISAS, default="native")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    wanted = environment(arguments.isa, arguments.threads, os.environ)
    wanted["GLIBC_TUNABLES"] = _KEEP_MEMORY
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    from gptj8.runtime.process import prepare_to_compute

    prepare_to_compute()
    import torch

    from gptj8.runtime.machine import cpu_name

    torch.set_num_threads(arguments.threads)
    print(f"{cpu_name()}, ISA {arguments.isa}, {arguments.threads} threads")
    if arguments.isa != "native":
        reason = OPPONENTS["llm-int8"].unlimited
        print(f"bitsandbytes could not be limited to {arguments.isa}: {reason}")
    print("\n| to | block size | gptj8, ms | bitsandbytes, ms | ratio |\n|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16", "float16"):
        for block_size in SCALE_BITS:
            seconds = measure(dtype, block_size, arguments.rounds)
            ours, theirs = seconds["gptj8"], seconds["bitsandbytes"]
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            milliseconds = [f"{1000 * statistics.median(x):.1f}" for x in (ours, theirs)]
            cells = (dtype, str(block_size), *milliseconds, f"{ratio:.1f}x")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
