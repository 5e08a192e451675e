"""Query the machine's hardware and the memory use of this process."""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from gptj8.runtime.errors import UserError

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB since the last `reset_peak_memory`.

    This is the memory of all GPUs if a GPU was used, otherwise resident memory.
    """
    if allocated := _on_gpus("max_memory_allocated"):
        return allocated / 2**30
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line for line in status if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 2**20


def cpu_name() -> str:
    """Return the processor's model name."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(command, text=True).strip()
    return platform.processor() or platform.machine()


def own_bytes() -> int:
    """Return the resident memory of this process that is not file-backed, or 0 if unknown.

    Only Linux reports what is file-backed; elsewhere this is all resident memory.
    """
    with suppress(psutil.Error, OSError):
        memory = _this_process(os.getpid()).memory_info()
        return memory.rss - getattr(memory, "shared", 0)
    return 0


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 if unknown."""
    with suppress(psutil.Error, OSError):
        return _this_process(os.getpid()).memory_info().rss
    return 0


@functools.lru_cache(maxsize=1)
def _this_process(process_id: int) -> psutil.Process:
    return psutil.Process(process_id)


def memory_gib() -> float:
    """Return the current memory of this process in GiB: of all GPUs if used, else resident."""
    if allocated := _on_gpus("memory_allocated"):
        return allocated / 2**30
    return resident_bytes() / 2**30 or peak_memory_gib()


def reset_peak_memory() -> None:
    """Restart the measurement of peak memory, where the system supports it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _on_gpus(statistic: str) -> int:
    """Return a memory statistic of torch.cuda, summed over all GPUs; 0 if no GPU was used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    read = getattr(torch.cuda, statistic)
    return sum(read(device) for device in range(torch.cuda.device_count()))


def available_bytes(device: str) -> int:
    """Return the memory that this process may use in total: free memory plus what it already has.

    Args:
        device: "cpu" (limits of containers, Slurm and systemd are respected) or "cuda".

    Raises:
        UserError: if the device is missing or its free memory is unknown.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no GPU found, so its memory is unknown; add --memory, such as 8GB")
        unused, _ = torch.cuda.mem_get_info()
        # Memory that torch has reserved is available to later allocations.
        return unused + torch.cuda.memory_reserved()
    try:
        free = psutil.virtual_memory().available
    except (psutil.Error, OSError):
        raise UserError(
            "this system does not report free memory; add --memory, such as 8GB"
        ) from None
    limits = [headroom for folder in _cgroups() if (headroom := _headroom(folder)) is not None]
    return min([free, *limits]) + resident_bytes()


def _cgroups(membership: Path = _MEMBERSHIP, root: Path = _CGROUP_ROOT) -> Iterator[Path]:
    """Yield the memory cgroups of this process, from its own to the outermost one.

    A limit can be at any of them: Slurm and systemd set it on an ancestor.

    Args:
        membership: lists a process's cgroups: `0::/path` in version 2, `4:memory:/path` in 1.
        root: where the hierarchies are mounted.
    """
    lines = []
    with suppress(OSError):
        lines = membership.read_text(encoding="utf-8").splitlines()
    paths = {root: "/", root / "memory": "/"}
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            paths[root] = path
        elif "memory" in controllers.split(","):
            paths[root / "memory"] = path
    for mount, path in paths.items():
        own = mount / path.lstrip("/")
        # In a container the path may be that of the host, which is not visible.
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount) and folder.is_dir():
                yield folder


def _headroom(cgroup: Path) -> int | None:
    """Return how many bytes a cgroup's limit leaves, or None if it has no limit.

    The kernel reclaims inactive page cache before it enforces the limit.
    """
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # missing, or "max"
            limit = int((cgroup / limit_file).read_text())
            usage = int((cgroup / usage_file).read_text())
            statistics = (cgroup / "memory.stat").read_text()
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)
            return max(0, limit - usage + (int(cache[1]) if cache else 0))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that GPU or CPU memory is exhausted."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError):
        return True
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # torch's allocator on the CPU and cuBLAS raise a RuntimeError.
    return any(text in str(error) for text in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's name and the number of compute threads."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
