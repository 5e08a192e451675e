"""Run one stage in several processes, started by torchrun.

`finetune.launcher` is a torchrun command line, such as `torchrun --nproc-per-node 2`. The stage
started by DVC runs torchrun and waits for it. torchrun starts the stage once per process, and each
process reads its rank from torchrun's environment variables. All processes compute; only the main
process (rank 0) prints, records and writes.

Training is data-parallel (torch's DistributedDataParallel under transformers' Trainer): each
process computes a share of the rows of every step. Evaluation is sharded by rows: each of n
processes evaluates every n-th row, and all processes receive all results.
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
from gptj8.runtime.messages import one_line, why_process_failed

_Result = TypeVar("_Result")


def process_count() -> int:
    """Return the number of processes on all machines (the world size)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether this process prints, records and writes. True if it is the only process."""
    return process_number() == 0


def processes_here() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch(launcher: str | None, module: str) -> bool:
    """Run a stage's module with a launcher and wait until it exits.

    Args:
        launcher: torchrun command line, or None to launch nothing.
        module: name of the stage's module, such as `stages.finetune`.

    Returns:
        True if the launcher ran the stage. False if there is nothing to launch or if this process
        was launched itself; the caller then does the work.

    Raises:
        UserError: if torchrun rejects its arguments, or if a signal killed a process.
        SystemExit: with the exit code of the process that failed first, which printed the reason.
    """
    if launcher is None or "RANK" in os.environ:
        return False
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    errors = io.StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            arguments = torchrun.parse_args([*shlex.split(launcher)[1:], "-m", module])
        here = torchrun.determine_local_world_size(arguments.nproc_per_node)
    except (SystemExit, ValueError) as error:
        reason = [*errors.getvalue().strip().splitlines(), str(error)][-2:][0]
        raise UserError(f"finetune.launcher = {launcher}: {one_line(reason)}") from None
    if arguments.training_script != module or here < 1:
        raise UserError(
            f"finetune.launcher = {launcher}: give only torchrun options and at least 1 process; "
            "the stage adds the module to run"
        )
    # By default torchrun limits every process to one core and prints a five-line warning about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    # The failed process has already printed the reason, so torchrun's report is redundant.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        if first.exitcode < 0:
            reason = why_process_failed(first.exitcode, "")
            raise UserError(f"process {first.local_rank} of {here}: {reason}") from None
        sys.exit(first.exitcode)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
    return True


def join() -> None:
    """Join the process group, if there are several processes, and select this process's GPU."""
    if process_count() == 1:
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if not distributed.is_initialized():
        # Processes synchronize once per evaluated system, and a slow one may be hours late.
        distributed.init_process_group(backend, timeout=timedelta(days=7))


def leave() -> None:
    """Leave the process group. Every process calls this; all except the main process exit."""
    if process_count() == 1:
        return
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()
    if not is_main_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a normal exit can deadlock in gloo's destructors


def from_main(decide: Callable[[], _Result]) -> _Result:
    """Call `decide` in the main process and return its result in every process.

    Raises:
        UserError: in every process, if `decide` raises it.
    """
    if process_count() == 1:
        return decide()
    from torch import distributed

    decided: list[Any] = [_attempt(decide) if is_main_process() else None]
    distributed.broadcast_object_list(decided)
    return _results_of(decided)[0]


def each_a_share(
    compute: Callable[[Sequence[int]], Iterable[_Result]], count: int
) -> list[_Result]:
    """Distribute `count` items over the processes and return all results in order.

    Each of n processes computes every n-th item.

    Args:
        compute: takes item indices and returns one result per item.
        count: number of items.

    Raises:
        UserError: in every process, if `compute` raises it in one of them.
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
    except UserError as error:  # any other exception is a bug and keeps its traceback
        return None, error


def _results_of(attempts: Sequence[tuple[Any, UserError | None]]) -> list[Any]:
    from torch import distributed

    for _, error in attempts:
        if error is not None:
            # Wait until every process has the error: the first exit closes the connections.
            with suppress(RuntimeError):
                distributed.barrier()
            raise error
    return [result for result, _ in attempts]


def summed(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all processes."""
    shares = each_a_share(lambda mine: [values], process_count())  # one item per process
    return [sum(column) for column in zip(*shares, strict=True)]


def share_trained_only(model: Any) -> None:
    """Exclude frozen weights from DistributedDataParallel's initial broadcast.

    Every process has already read them from the file. Writing to them would turn the memory-mapped
    pages into private memory.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model._ddp_params_and_buffers_to_ignore = [
        name for name, tensor in state.items() if not tensor.requires_grad
    ]
