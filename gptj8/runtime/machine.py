"""What this machine is, and what memory a process takes of it."""

from __future__ import annotations

import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

from gptj8.runtime.errors import UserError

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


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


def available_bytes(device: str) -> int:
    """Return how much memory this process may have in all: what is free, and what it has.

    Args:
        device: "cpu", within the limits of a container, or "cuda".

    Raises:
        UserError: if there is no such device, or its memory is not known.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no GPU is here to ask for its memory; add --memory, such as 8GB")
        unused, _ = torch.cuda.mem_get_info()
        # What torch has reserved and does not use it gives to the next that asks.
        return unused + torch.cuda.memory_reserved()
    free = _meminfo("MemAvailable")
    if free is None:
        raise UserError("this system does not tell how much memory is free; add --memory")
    for limit_file, usage_file, statistics in _CGROUPS:
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage + _reclaimable(statistics)))
    return free + resident_bytes()


def device_name(device: str) -> str:
    """Return what the processor or GPU calls itself, and how many threads compute."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def _meminfo(key: str) -> int | None:
    with suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        return int(found[1]) * 1024 if found else None
    return None


def _number(file: str) -> int | None:
    with suppress(OSError, ValueError):
        return int(Path(file).read_text())
    return None  # absent, or "max"


def _reclaimable(statistics: str) -> int:
    """Return the bytes of files that a container holds and the system takes back when asked."""
    with suppress(OSError):
        found = re.search(r"^(?:total_)?inactive_file (\d+)$", Path(statistics).read_text(), re.M)
        return int(found[1]) if found else 0
    return 0
