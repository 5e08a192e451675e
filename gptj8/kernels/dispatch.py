"""The fastest way at hand to do what `gptj8.kernels.reference` does, bit for bit.

On a CPU the compiled kernels of `gptj8.kernels.cpu`. On CUDA, and on a CPU without those,
bitsandbytes' operator restores weights; where that is absent, Triton does on CUDA, which also
multiplies few rows (`gptj8.kernels.gpu`). The torch reference does everything else. Chosen per call
by device; `describe` says what was chosen.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from gptj8.kernels import cpu, gpu, reference

_logger = logging.getLogger(__name__)
_scratch = threading.local()


def backend(tensor: torch.Tensor) -> ModuleType:
    """Return the module whose `absmax`, `histogram`, `encode` and `squared_errors` serve a tensor:
    `reference`, or its twin `cpu`, whose sums of errors may differ in their last bits."""
    return cpu if tensor.device.type == "cpu" and _compiled_works() else reference


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.dequantize`.

    Args:
        out: where to put the result: contiguous, of `dtype`, the codes' shape and device.
    """
    if backend(codes) is cpu and dtype in cpu.DTYPES:
        return cpu.dequantize(codes, absmax, codebook, block_size, dtype, out)
    arguments = (codes.contiguous(), absmax, codebook, block_size, dtype)
    has_kernels = codes.device.type in ("cpu", "cuda") and codes.numel() and dtype in cpu.DTYPES
    operator = _bitsandbytes() if has_kernels else None
    if operator and out is not None and codes.device.type == "cuda":
        operator.out(*arguments, out=out)
        return out
    if has_kernels and not operator and gpu.is_available(codes.device):
        return gpu.dequantize(*arguments, out)
    restored: torch.Tensor = (operator.default if operator else reference.dequantize)(*arguments)
    return restored if out is None else out.copy_(restored)


def few_rows(x: torch.Tensor) -> int:
    """Return up to how many rows of x a product straight from the codes (`linear`) is faster."""
    if x.dtype not in cpu.DTYPES:
        return 0
    if x.device.type == "cuda":
        return gpu.MAX_ROWS if gpu.is_available(x.device) else 0
    return cpu.MAX_ROWS if x.device.type == "cpu" and _compiled_works() else 0


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Return x W^T without restoring W, summed in float32.

    Args:
        x: (..., in), of at most `few_rows` rows.
        codes: uint8 (out, in).

    Returns:
        (..., out) in the dtype of x. In bfloat16 the codebook is rounded, where restoring rounds
        its products with absmax: the same error, not the same bits.
    """
    if x.device.type == "cuda":
        return gpu.linear(x, codes, absmax, codebook, None, block_size)
    return cpu.linear(x, codes, absmax, codebook, block_size)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for a restored weight, valid until this thread asks again.

    New memory costs more than the restoring itself on a CPU: the system clears each page. CUDA's
    allocator of torch reuses memory by itself.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # or only inference could use it from then on
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        _scratch.buffer = buffer
    return buffer[:size].view(dtype).view(*shape)


def describe(device: torch.device) -> str:
    """Return in words how weights are restored on a device."""
    if device.type == "cpu" and _compiled_works():
        return "compiled kernels"
    if device.type in ("cpu", "cuda") and _bitsandbytes():
        return "bitsandbytes' operator"
    return "Triton" if gpu.is_available(device) else "plain torch"


@functools.cache
def _compiled_works() -> bool:
    """Whether the compiled kernels are there and agree with the reference on a small tensor."""
    if cpu.library() is None:
        return False
    weights = torch.linspace(-3.0, 2.0, 5001, device="cpu").sin()
    codebook = torch.linspace(-1.0, 1.0, 256, device="cpu")
    codebook[127] = 0.0
    results: dict[ModuleType, list[torch.Tensor]] = {cpu: [], reference: []}
    for module, found in results.items():
        for dtype, block_size in itertools.product(cpu.DTYPES, (64, 2048)):
            flat = weights.to(dtype)
            scales = module.absmax(flat, block_size)
            mass = module.histogram(flat, scales, scales.double().ceil(), block_size, 1024)
            boundaries = reference.exact_midpoints(codebook)
            codes = module.encode(flat, scales, boundaries, block_size)
            restored = module.dequantize(codes, scales, codebook, block_size, dtype)
            found += [scales, mass, codes, restored]
    agree = all(itertools.starmap(torch.equal, zip(*results.values(), strict=True)))
    if not agree:
        _logger.warning("the compiled CPU kernels disagree with the reference and are not used")
    return agree


@functools.cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes' operator, whose form that fills a given tensor CUDA alone has; None
    where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401 (defines the operator)
    except ImportError:
        return None
    return torch.ops.bitsandbytes.dequantize_blockwise
