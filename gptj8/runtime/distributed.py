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
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

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

    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            arguments = torchrun.parse_args([*shlex.split(launcher)[1:], "-m", module])
        here = torchrun.determine_local_world_size(arguments.nproc_per_node)
    except (SystemExit, ValueError) as error:
        reason = [*said.getvalue().strip().splitlines(), str(error)][-2:][0]
        raise UserError(f"finetune.launcher = {launcher}: {one_line(reason)}") from None
    if arguments.training_script != module or here < 1:
        raise UserError(
            f"finetune.launcher = {launcher}: options of torchrun alone, for 1 process or more; "
            "the stage adds what is run"
        )
    # Else every process computes on one core, which torchrun says in five lines.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
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
        # They meet once for each system evaluated, and hours apart where one is slower.
        distributed.init_process_group(backend, timeout=timedelta(days=7))


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
    """Return what the main process decides, in all of them; what it refuses, all refuse."""
    if process_count() == 1:
        return decide()
    from torch import distributed

    decided: list[Any] = [_attempt(decide) if is_main_process() else None]
    distributed.broadcast_object_list(decided)
    return _results_of(decided)[0]


def each_a_share(
    compute: Callable[[Sequence[int]], Iterable[_Result]], count: int
) -> list[_Result]:
    """Compute results of `count` items, every n-th in one of n processes; return all, in order.

    Args:
        compute: returns one result an item, given their numbers. What it refuses in one process is
            refused in all.
    """
    processes = process_count()
    if processes == 1:
        return list(compute(range(count)))
    from torch import distributed

    mine = range(process_number(), count, processes)
    shares: list[Any] = [None] * processes
    share = _attempt(lambda: list(compute(mine)) if mine else [])
    distributed.all_gather_object(shares, share)
    results: list[Any] = [None] * count
    for number, found in enumerate(_results_of(shares)):
        results[number::processes] = found
    return results


def _attempt(work: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return work(), None
    except UserError as error:  # anything else is a fault, and ends this process with a traceback
        return None, error


def _results_of(attempts: Sequence[tuple[Any, UserError | None]]) -> list[Any]:
    from torch import distributed

    for _, error in attempts:
        if error is not None:
            # All have heard of it before the first one ends, and closes its connections.
            with suppress(RuntimeError):
                distributed.barrier()
            raise error
    return [result for result, _ in attempts]


def summed(values: Sequence[float]) -> list[float]:
    """Return the sums of each value over all processes."""
    shares = each_a_share(lambda mine: [values], process_count())  # one item a process
    return [sum(column) for column in zip(*shares, strict=True)]


def share_trained_only(model: Any) -> None:
    """Keep DistributedDataParallel from sending frozen weights: every process has read them, and
    written to they would no longer be pages of a file."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model._ddp_params_and_buffers_to_ignore = [
        name for name, tensor in state.items() if not tensor.requires_grad
    ]
