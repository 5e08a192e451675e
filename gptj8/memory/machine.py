"""What this machine has: memory that is free, and what the process itself takes of it."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from gptj8.runtime.errors import UserError
from gptj8.runtime.machine import cpu_name, resident_bytes

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def parse_bytes(text: str) -> int:
    """Return how many bytes `8GB` (10^9 each), `7.5GiB` (2^30) or a plain number are.

    Raises:
        UserError: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise UserError(f"--memory {text}: a size is written like 8GB or 7.5GiB")
    unit = match[2].upper()
    base = 1 if not unit else (1024 if match[3] else 1000)
    size = int(float(match[1]) * base ** _UNITS[unit])
    if size <= 0:
        raise UserError(f"--memory {text}: must be more than nothing, such as 8GB")
    return size


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


def process_bytes(dtype: str) -> int:
    """Return what Python and the libraries take once a small model has been trained a step.

    Code is read into memory as it is first run, and every library keeps what it needs throughout;
    so a step is taken in this process, on a model whose own size is of no account. Random numbers
    drawn later are the same as if it had not been.

    Args:
        dtype: of the arithmetic, a name in torch.
    """
    import bitsandbytes
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    from gptj8.kernels.fused import register_fused_attention
    from gptj8.model.adapters import AdapterSpec, add_adapter
    from gptj8.quantization.layers import Frozen8bitModule
    from gptj8.quantization.quantizer import Blockwise8bitConfig, swap_modules

    register_fused_attention()
    kind = getattr(torch, dtype)
    config = GPTJConfig(
        vocab_size=256,
        n_positions=64,
        n_embd=128,
        n_layer=1,
        n_head=2,
        rotary_dim=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.use_cache = False
    state = torch.get_rng_state()
    try:
        model = GPTJForCausalLM._from_config(config, dtype=kind)
        swap_modules(model, Blockwise8bitConfig(), kind)
        for module in model.modules():
            if isinstance(module, Frozen8bitModule):
                module.codebook.copy_(torch.linspace(-1, 1, 256))
                module.absmax.fill_(0.1)
        adapted = add_adapter(model, AdapterSpec()).train()
        ids = torch.arange(64).expand(4, -1)
        adapted(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        bitsandbytes.optim.AdamW8bit(trained).step()
    finally:
        torch.set_rng_state(state)
    del adapted, model
    gc.collect()
    return resident_bytes()


def process_bytes_elsewhere(dtype: str) -> int:
    """Return `process_bytes` of a new process, which has imported nothing else."""
    command = [sys.executable, "-m", "gptj8.memory.machine", dtype]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the libraries' memory cannot be measured: {reason[:300]}")
    return int(json.loads(process.stdout.splitlines()[-1]))


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


if __name__ == "__main__":
    from gptj8.runtime.process import UNUSED_IN_TRAINING, prepare_to_compute

    prepare_to_compute(UNUSED_IN_TRAINING)  # as the stage does
    import transformers.trainer  # noqa: F401 (what the stage imports)

    import gptj8.dataset.prepared.dataset
    import gptj8.reference
    import gptj8.tracking  # noqa: F401

    print(json.dumps(process_bytes(sys.argv[1])))
