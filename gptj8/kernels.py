"""The fastest way at hand to do what `gptj8.blockwise` does, bit for bit.

On a CPU the compiled kernels of `gptj8.native`, else bitsandbytes' operator for dequantization; on
CUDA bitsandbytes' operator; the torch reference for everything else. Chosen per call by device;
`describe` says what was chosen.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from gptj8 import blockwise, native

_logger = logging.getLogger(__name__)
_scratch = threading.local()


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """See `blockwise.absmax`."""
    return _backend(flat).absmax(flat, block_size)


def histogram(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    block_mass: torch.Tensor,
    block_size: int,
    bins: int,
) -> torch.Tensor:
    """See `blockwise.histogram`."""
    return _backend(flat).histogram(flat, absmax, block_mass, block_size, bins)


def encode(
    flat: torch.Tensor, absmax: torch.Tensor, boundaries: torch.Tensor, block_size: int
) -> torch.Tensor:
    """See `blockwise.encode`."""
    return _backend(flat).encode(flat, absmax, boundaries, block_size)


def squared_errors(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `blockwise.squared_errors`; sums may differ in their last bits."""
    return _backend(flat).squared_errors(flat, codes, absmax, codebook, block_size)


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `blockwise.dequantize`.

    Args:
        out: where to put the result: contiguous, of `dtype`, the codes' shape and device.
    """
    backend = _backend(codes)
    if backend is native:
        return native.dequantize(codes, absmax, codebook, block_size, dtype, out)
    restore: Callable[..., torch.Tensor] = blockwise.dequantize
    if codes.device.type in ("cpu", "cuda") and codes.numel():
        restore = _bitsandbytes() or restore
    restored = restore(codes, absmax, codebook, block_size, dtype)
    return restored if out is None else out.copy_(restored)


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
        _scratch.buffer = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(*shape)


def describe(device: torch.device) -> str:
    """Return in words how weights are restored on a device."""
    if device.type == "cpu" and _native_works():
        return "compiled kernels"
    if device.type in ("cpu", "cuda") and _bitsandbytes():
        return "bitsandbytes' operator"
    return "plain torch"


def _backend(tensor: torch.Tensor) -> ModuleType:
    return native if tensor.device.type == "cpu" and _native_works() else blockwise


@functools.cache
def _native_works() -> bool:
    """Whether the compiled kernels are there and agree with the reference on a small tensor."""
    if native.library() is None:
        return False
    flat = torch.linspace(-3.0, 2.0, 5001).sin().half()
    codebook = torch.linspace(-1.0, 1.0, 256)
    codebook[127] = 0.0
    boundaries = blockwise.exact_midpoints(codebook)
    results = []
    for backend in (native, blockwise):
        scales = backend.absmax(flat, 2048)
        mass = backend.histogram(flat, scales, scales.double().ceil(), 2048, 1024)
        codes = backend.encode(flat, scales, boundaries, 2048)
        restored = backend.dequantize(codes, scales, codebook, 2048, torch.bfloat16)
        results.append((scales, mass, codes, restored))
    agree = all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    if not agree:
        _logger.warning("the compiled CPU kernels disagree with the reference and are not used")
    return agree


@functools.cache
def _bitsandbytes() -> Callable[..., torch.Tensor] | None:
    try:
        import bitsandbytes  # noqa: F401 (defines the operator)
    except ImportError:
        return None
    return torch.ops.bitsandbytes.dequantize_blockwise.default
