"""Start-up and shutdown shared by every process: telemetry, errors, exit codes, memory settings."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import select
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

# Turn telemetry off by default. A variable that the user has set takes precedence. DVC's own
# settings are in .dvc/config.
_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # An unreachable tracking server must be noticed within seconds.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

COMPILED_PRODUCTS = 32
"""The number of compiled matrix products that oneDNN caches, on a CPU."""
UNUSED_IN_TRAINING = ("scipy",)
"""Packages that transformers imports only for an object detection loss: 40 MB and 0.5 s."""
LARGE_BLOCK = 32 << 20
"""The size in bytes from which malloc uses mmap instead of the heap, in a process restarted by
`restart_with_malloc_settings`."""
_HEAP_TUNABLES = ":".join(
    (
        "glibc.malloc.tcache_count=0",
        "glibc.malloc.mxfast=0",
        f"glibc.malloc.mmap_threshold={LARGE_BLOCK}",
        f"glibc.malloc.trim_threshold={1 << 30}",  # keep a step's memory for the next step
        # Use 2 MB pages where available, which means 512 times fewer page faults. Of three small
        # models, two trained 8 and 4 % faster and one 2 % slower, with the same memory.
        "glibc.malloc.hugetlb=1",
    )
)
_RESTARTED = "gptj8_heap"  # the -X option that marks a restarted process
_BLOCKED_DURING_RESTART = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 5.0
_FILE_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "disk failure (input/output error)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "a folder was found instead of a file",
    errno.ENOTDIR: "a file was found instead of a folder",
    errno.EEXIST: "the path already exists",
    errno.ELOOP: "the symbolic links form a loop",
    errno.ENAMETOOLONG: "the file name is too long",
}


def set_defaults() -> None:
    """Set the environment defaults. Call this before any third-party package is imported.

    Also silences library messages that do not concern the user: a 4-bit CPU kernel that
    bitsandbytes would download from the Hub, an attribute that transformers has renamed and PEFT
    still uses, and PEFT's warning that LayerNorms are unsupported although it trains them
    (tests/training/test_loop.py).
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="Unsupported layer type .*LayerNorm")
    # Waiting OpenMP threads spin for some microseconds and then sleep. Long spinning, libgomp's
    # default, makes a step many times slower when other processes use the cores. Sleeping at once
    # makes it a third slower on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # torch caches 1,024 compiled matrix products, one per combination of shapes, each with 0.5 to
    # 5 MB of working memory. With rows of many lengths the default pipeline took 2.2 GiB instead of
    # 0.9 GiB; a 6B model would take 3 GB more. Recompiling costs milliseconds.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(COMPILED_PRODUCTS))
    # Otherwise a tokenizer that was used before a fork prints a long warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def restart_with_malloc_settings() -> None:
    """Restart this process with malloc settings that reduce fragmentation of glibc's heap.

    Call this before torch is imported, in a process that computes with a model on a CPU. By default
    glibc caches freed small objects that lie between tensors. The gap left by a freed tensor cannot
    merge across them, and it is too small for the next tensor because torch aligns addresses to 64
    bytes. Training steps of mid-sized models took 0.2 GiB more and up to a quarter longer, because
    they waited for new memory.

    glibc reads these settings only at process start, so the process replaces itself with execve. It
    keeps its id and arguments, and its children get the original environment. Nothing happens with
    another C library, or if the user has set malloc options.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if _RESTARTED in sys._xoptions:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED_DURING_RESTART)
        before = given.removesuffix(_HEAP_TUNABLES).rstrip(":")
        os.environ.pop("GLIBC_TUNABLES", None)
        if before:
            os.environ["GLIBC_TUNABLES"] = before
        return
    has_own = "glibc.malloc" in given or any(name.startswith("MALLOC_") for name in os.environ)
    if has_own or platform.libc_ver()[0] != "glibc":
        return
    tunables = f"{given}:{_HEAP_TUNABLES}" if given else _HEAP_TUNABLES
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    sys.stdout.flush()
    sys.stderr.flush()
    # Python has no signal handlers during start-up and would print a traceback on an interrupt.
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_DURING_RESTART)
    with suppress(OSError):  # continue without the settings
        command = [sys.executable, "-X", _RESTARTED, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED_DURING_RESTART)


def prepare_to_compute(unused: Sequence[str] = ()) -> None:
    """Prepare a process that computes with a model. Call this before torch is imported.

    Args:
        unused: packages that the process never uses but libraries import if they are installed.
            They can no longer be imported after this call. With a CPU build of torch, Triton is
            added to them, which saves 75 MB and 0.5 s.
    """
    restart_with_malloc_settings()
    set_defaults()
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            unused = (*unused, "triton")
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # documented: blocks the import


def run(main: Callable[[], object], *, computes: bool = False, unused: Sequence[str] = ()) -> None:
    """Run a stage or a command and set the exit code of the process.

    The exit code is 0 on success, 2 for an error that the user can fix (printed to stderr, one line
    per problem), 130 if interrupted and 143 if terminated. Any other exception is a bug in this
    project and keeps its traceback.

    Args:
        main: the function to run.
        computes: whether `main` computes with a model, so that `prepare_to_compute` is needed.
        unused: see `prepare_to_compute`.
    """
    # Signals raise exceptions, so that staging directories and the tracked run are cleaned up.
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see stages/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if computes:
            prepare_to_compute(unused)
        else:
            set_defaults()
        main()
        flush_output()
    except UserError as error:
        _exit_with_errors(str(error))
    except BrokenPipeError:
        if not _reader_is_gone():  # some other pipe or connection is broken
            raise
        _exit_without_reader()
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        _exit_with_errors(explanation)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def flush_output() -> None:
    """Write out standard output; exit with code 141 if its reader is gone, as in `gptj8 X | head`.

    141 is the exit code of a process that SIGPIPE ends.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _exit_without_reader()


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _exit_without_reader() -> NoReturn:
    # Python flushes once more at exit; give it a place to write to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _exit_with_errors(problems: str) -> NoReturn:
    """Print one error per line and exit with code 2."""
    if not is_main_process():
        # Usually all processes have the same error. Let the main process print it and exit first,
        # which terminates this one.
        time.sleep(_GRACE_SECONDS)
    for line in problems.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _explain(error: Exception) -> str | None:
    """Return a one-line message for disk and memory errors, or None for any other error."""
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS:
        where = f": {error.filename}" if error.filename else ""
        return f"{_FILE_ERRORS[error.errno]}{where}; no partial output was written"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory; halve finetune.per_device_train_batch_size and double "
            "gradient_accumulation_steps, or lower data.max_length, "
            "evaluate.per_device_eval_batch_size or --max-batch"
        )
    if "selective activation checkpoint" in str(error):
        return (
            "finetune.checkpointing = selective cannot be used: this model modifies the results of "
            "matrix products in place; set it to full or none"
        )
    if type(error).__name__ == "SafetensorError":  # it has only the number of the OS error
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        known = _FILE_ERRORS.get(int(number[1] or number[2])) if number else None
        return f"{known} (model weights); no partial output was written" if known else None
    return None


def _raise_terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def path_of_this_python() -> str:
    """Return a PATH on which `python` is this interpreter, as the commands in dvc.yaml need it."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
