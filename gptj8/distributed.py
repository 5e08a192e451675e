"""Several processes for one stage: started by torchrun, told apart by its variables.

`finetune.launcher` is torchrun's own command line, such as `torchrun --nproc-per-node 2`. The stage
that DVC runs starts it and waits; in each process that it starts, the stage runs again and finds
itself one of several. All of them compute, and the first one, the main process, alone speaks,
records and writes.

Training is data-parallel (torch's DistributedDataParallel under transformers' Trainer): each
process takes its share of the rows of every step. Evaluation is sharded by rows: each process takes
every n-th, and all get all results.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from typing import Any, TypeVar

from gptj8.errors import UserError

_Result = TypeVar("_Result")


def process_count() -> int:
    """Return how many processes share the work, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the one that speaks, records and writes; true where there is only one."""
    return process_number() == 0


def processes_here() -> int:
    """Return how many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch(launcher: str | None, module: str) -> bool:
    """Run a stage's module by a launcher and wait for its end.

    Args:
        launcher: torchrun's command line; None: nothing is launched.
        module: its name, such as `stages.finetune`.

    Returns:
        False if there is nothing to launch, or this process was launched itself: it is to work.

    Raises:
        UserError: if torchrun does not understand its arguments.
        SystemExit: with the code of the process that failed first.
    """
    if launcher is None or "RANK" in os.environ:
        return False
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*shlex.split(launcher)[1:], "-m", module]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            arguments = torchrun.parse_args(words)
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1:]
        raise UserError(f"finetune.launcher = {launcher}: {''.join(reason)}") from None
    # Else every process computes on one core, which torchrun says in five lines.
    found = re.search(r"nproc[-_]per[-_]node[= ](\d+)", launcher)
    threads = max(1, (os.cpu_count() or 1) // int(found[1] if found else 1))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The process that failed has said why; a report of ours on top tells nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        sys.exit(first.exitcode if first.exitcode > 0 else 1)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    return True


def join() -> None:
    """Meet the other processes, if there are any, and take this one's GPU."""
    if process_count() == 1:
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if not distributed.is_initialized():
        distributed.init_process_group(backend)


def leave() -> None:
    """End what `join` began; every process calls it, and those that are not the main one end."""
    if process_count() == 1:
        return
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()
    if not is_main_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's destructors have been seen to wait for each other for ever


def from_main(decide: Callable[[], _Result]) -> _Result:
    """Return what the main process decides, in all of them."""
    if process_count() == 1:
        return decide()
    from torch import distributed

    decided: list[Any] = [decide() if is_main_process() else None]
    distributed.broadcast_object_list(decided)
    return decided[0]


def each_a_share(
    compute: Callable[[Sequence[int]], Iterable[_Result]], count: int
) -> list[_Result]:
    """Compute results of `count` items, every n-th in one of n processes; return all, in order.

    Args:
        compute: returns one result an item, given their numbers.
    """
    processes = process_count()
    if processes == 1:
        return list(compute(range(count)))
    from torch import distributed

    mine = range(process_number(), count, processes)
    shares: list[Any] = [None] * processes
    distributed.all_gather_object(shares, list(compute(mine)) if mine else [])
    results: list[Any] = [None] * count
    for number, share in enumerate(shares):
        results[number::processes] = share
    return results


def summed(values: Sequence[float]) -> list[float]:
    """Return the sums of each value over all processes."""
    if process_count() == 1:
        return list(values)
    from torch import distributed

    shares: list[Any] = [None] * process_count()
    distributed.all_gather_object(shares, list(values))
    return [sum(column) for column in zip(*shares, strict=True)]


def share_trained_only(model: Any) -> None:
    """Keep DistributedDataParallel from sending frozen weights: every process has read them, and
    written to they would no longer be pages of a file."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model._ddp_params_and_buffers_to_ignore = [
        name for name, tensor in state.items() if not tensor.requires_grad
    ]
