"""What every process of the project does first and last: privacy, errors, exit codes, memory."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from gptj8.runtime.distributed import is_main_process
from gptj8.runtime.errors import UserError

# Nothing phones home unless the user says so: these are defaults, so that a variable that the user
# has set wins. DVC's own switches are in .dvc/config.
_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A tracking server that is away is noticed in seconds: the work does not wait for it.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

COMPILED_PRODUCTS = 32
"""Matrix products that oneDNN keeps compiled, on a CPU."""
UNUSED_IN_TRAINING = ("scipy",)
"""What transformers imports for a loss of object detection: 40 MB and half a second."""
LARGE_BLOCK = 32 << 20
"""Bytes from which on a block is not in the heap of a process that `restart_with_malloc_settings`
began."""
_HEAP = ":".join(
    (
        "glibc.malloc.tcache_count=0",
        "glibc.malloc.mxfast=0",
        f"glibc.malloc.mmap_threshold={LARGE_BLOCK}",
        f"glibc.malloc.trim_threshold={1 << 30}",  # a step's memory serves the next step
        # Pages of 2 MB where the system offers them: 512 times fewer are taken one by one. Three
        # small models trained 8 and 4 % faster and 2 % slower by it, in the same memory.
        "glibc.malloc.hugetlb=1",
    )
)
_BEGUN_ANEW = "gptj8_heap"
_HELD_WHILE_BEGINNING = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 5.0
_OF_FILES = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails (input/output error)",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EISDIR: "a folder is in the place of a file",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EEXIST: "something else is in its place",
    errno.ELOOP: "links lead to each other",
    errno.ENAMETOOLONG: "the name is too long",
}


def set_defaults() -> None:
    """Set the environment defaults; to be called before a third-party package is imported.

    Also silences messages of libraries that are about each other and not about the user: a 4-bit
    CPU kernel that bitsandbytes would fetch from the Hub, a name that PEFT still uses and
    transformers has renamed, and PEFT's doubts about LayerNorms, which it trains (tests/training/
    test_loop.py) though it knows them no device for.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="Unsupported layer type .*LayerNorm")
    # Threads of an operation that wait for each other spin for some microseconds and then sleep.
    # Spinning for long, libgomp's default, makes a step many times slower as soon as something else
    # uses the cores; sleeping at once makes it a third slower on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # torch keeps 1,024 compiled products, one for each combination of shapes, and each holds its
    # working memory, 0.5 to 5 MB. Rows of many lengths made the embedded default take 2.2 GiB where
    # 0.9 suffice, and would take 3 GB more of a 6 B model. Compiling anew costs milliseconds.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(COMPILED_PRODUCTS))
    # A tokenizer that was used before a fork warns about it at length; there is nothing to gain
    # here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def restart_with_malloc_settings() -> None:
    """Start this process anew with settings that keep glibc's heap dense, unless they are there.

    For a process that computes with a model on a CPU; to be called before torch is imported. As it
    comes, glibc keeps freed small objects aside, between tensors; the hole that a tensor leaves
    cannot grow over them and is too small for the next one, because torch asks for addresses that
    64 divides. Training steps of mid-sized models took 0.2 GiB more and, waiting for new memory,
    up to a quarter longer. The settings are read before a process begins, hence anew; its id and
    arguments stay, and its children have the environment that it was given. Another C library, or
    settings of the user's own, leave all as it is.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if _BEGUN_ANEW in sys._xoptions:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_WHILE_BEGINNING)
        before = given.removesuffix(_HEAP).rstrip(":")
        os.environ.pop("GLIBC_TUNABLES", None)
        if before:
            os.environ["GLIBC_TUNABLES"] = before
        return
    has_own = "glibc.malloc" in given or any(name.startswith("MALLOC_") for name in os.environ)
    if has_own or platform.libc_ver()[0] != "glibc":
        return
    environment = {**os.environ, "GLIBC_TUNABLES": f"{given}:{_HEAP}" if given else _HEAP}
    sys.stdout.flush()
    sys.stderr.flush()
    # While Python begins it knows of no handler, and would show where it was interrupted.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_WHILE_BEGINNING)
    with suppress(OSError):  # then as it is
        command = [sys.executable, "-X", _BEGUN_ANEW, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_WHILE_BEGINNING)


def prepare_to_compute(unused: Sequence[str] = ()) -> None:
    """Do what a process that computes with a model does first, before torch is imported.

    Args:
        unused: packages that it never uses, though libraries import them wherever they are
            installed: an import of them fails from here on, as if they were not. Triton is one
            where torch was built for CPUs: 75 MB and half a second.
    """
    restart_with_malloc_settings()
    set_defaults()
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            unused = (*unused, "triton")
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # which Python documents


def run(main: Callable[[], object], *, computes: bool = False, unused: Sequence[str] = ()) -> None:
    """Run a stage or a command and turn its end into an exit code.

    0 done; 2 something the user can mend, in one line a problem on stderr; 130 and 143 interrupted
    and terminated. Anything else is a fault of this project and keeps its traceback.

    Args:
        computes: whether it computes with a model, and `prepare_to_compute` is of use.
        unused: see there.
    """
    # As exceptions, so that staging directories are cleaned up and the tracked run is closed.
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see stages/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if computes:
            prepare_to_compute(unused)
        else:
            set_defaults()
        main()
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        _refuse(explanation)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _refuse(problems: str) -> NoReturn:
    """Print what the user can mend, a line each, and exit with 2."""
    if not is_main_process():
        # Of several processes most fail alike, and the main one says so; its end ends this one.
        time.sleep(_GRACE_SECONDS)
    for line in problems.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _explain(error: Exception) -> str | None:
    """Return one line for what is no fault of this project: disks and memory; None for all else."""
    if isinstance(error, OSError) and error.errno in _OF_FILES:
        what = f" for {error.filename}" if error.filename else ""
        return f"{_OF_FILES[error.errno]}{what}; what was there is as it was"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory; halve finetune.per_device_train_batch_size and double "
            "gradient_accumulation_steps, or lower data.max_length, "
            "evaluate.per_device_eval_batch_size or --max-batch"
        )
    if "selective activation checkpoint" in str(error):
        return (
            "this model changes what its products return in place, which finetune.checkpointing: "
            "selective cannot keep; set it to full or none"
        )
    if type(error).__name__ == "SafetensorError":  # which names the error by its number alone
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        known = _OF_FILES.get(int(number[1] or number[2])) if number else None
        return f"{known} for weights; what was there is as it was" if known else None
    return None


def _raise_terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def path_of_this_python() -> str:
    """Return a PATH by which DVC's `python -m` is this Python, environment entered or not."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
