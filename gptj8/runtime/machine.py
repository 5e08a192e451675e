"""What this machine is, and what memory a process takes of it."""

from __future__ import annotations

import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB since the last `reset_peak_memory`: the GPU's
    if one was used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line for line in status if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 2**20


def cpu_name() -> str:
    """Return what the processor calls itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return platform.processor() or platform.machine()


def own_bytes() -> int:
    """Return the memory that this process has now and no file backs; 0 where the system does not
    tell."""
    resident, of_files = _resident()
    return resident - of_files


def resident_bytes() -> int:
    """Return the memory that this process has now; 0 where the system does not tell."""
    return _resident()[0]


def _resident() -> tuple[int, int]:
    """Return the bytes that are in memory, and those of them that are of files."""
    with suppress(OSError, ValueError):
        _, resident, of_files, *_ = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        return int(resident) * resource.getpagesize(), int(of_files) * resource.getpagesize()
    return 0, 0


def memory_gib() -> float:
    """Return the memory of this process in GiB now: the GPU's if one is used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_allocated() / 2**30
    return resident_bytes() / 2**30 or peak_memory_gib()  # the latter where it is not Linux


def reset_peak_memory() -> None:
    """Begin to measure anew, where the system can: what follows is not blamed for what was."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
