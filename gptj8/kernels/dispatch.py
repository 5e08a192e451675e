"""Choose the fastest available implementation of `gptj8.kernels.reference` for each call.

All of them restore weights bit for bit like the reference. The choice depends on the device:

- CPU: the compiled kernels of `gptj8.kernels.cpu` do everything. Without them, bitsandbytes'
  operator restores weights.
- CUDA: bitsandbytes' operator restores weights, or Triton if bitsandbytes is not installed. Triton
  also multiplies inputs of few rows (`gptj8.kernels.gpu`).

The torch reference does the rest. `describe` returns the name of the chosen implementation.
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
from torch._subclasses.fake_tensor import FakeTensor

from gptj8.kernels import cpu, gpu, reference

_logger = logging.getLogger(__name__)
_scratch = threading.local()


def backend(tensor: torch.Tensor) -> ModuleType:
    """Return the module to call `absmax`, `histogram`, `encode`, `search_levels` and
    `squared_errors` from.

    Either `reference` or `cpu`. Only the sums of `squared_errors` may differ between them, in the
    last bits.
    """
    return cpu if tensor.device.type == "cpu" and _compiled_works() else reference


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codebook[codes] * scale; see `reference.dequantize`.

    Args:
        out: tensor to write the result to; contiguous, with `dtype` and the shape and device of
            the codes.
    """
    if backend(codes) is cpu and dtype in cpu.DTYPES:
        return cpu.dequantize(codes, absmax, codebook, block_size, dtype, out, levels)
    scales = reference.scales_of(absmax, levels)
    arguments = (codes.contiguous(), scales, codebook, block_size, dtype)
    has_kernels = codes.device.type in ("cpu", "cuda") and codes.numel() and dtype in cpu.DTYPES
    operator = _bitsandbytes() if has_kernels else None
    if operator and out is not None and codes.device.type == "cuda":
        operator.out(*arguments, out=out)
        return out
    if has_kernels and not operator and gpu.is_available(codes.device):
        return gpu.dequantize(*arguments, out)
    restored: torch.Tensor = (operator.default if operator else reference.dequantize)(*arguments)
    return restored if out is None else out.copy_(restored)


def most_rows(
    x: torch.Tensor, columns: int, codebook: torch.Tensor, block_size: int, across: bool
) -> int:
    """Return the most rows of x for which `multiply` is faster than restoring W.

    Returns 0 if `multiply` is unavailable. Arguments are those of `multiply`. Fake tensors are
    allowed; their codebook is taken for the fitted one of the block size.
    """
    if x.dtype not in cpu.DTYPES:
        return 0
    if x.device.type == "cuda":
        return gpu.MAX_ROWS if not across and gpu.is_available(x.device) else 0
    if x.device.type != "cpu" or not _compiled_works():
        return 0
    is_fake = isinstance(codebook, FakeTensor) or codebook.device.type == "meta"
    if is_fake:
        return cpu.most_rows(x, columns, cpu.Kind.of(block_size), across)
    return cpu.most_rows(x, columns, codebook, across)


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    levels: torch.Tensor | None = None,
    across: bool = False,
) -> torch.Tensor:
    """Return x W^T, or x W, computed directly from the codes of W, summed in float32.

    A restored W is never written to memory.

    Args:
        x: (..., columns), or (..., rows) if `across`; at most `most_rows` rows.
        codes: uint8 (rows, columns).
        across: whether to return x W, which adds up along the rows of W.

    Returns:
        (..., rows), or (..., columns) if `across`, in the dtype of x. Nothing else is rounded to 16
        bits, except if a CPU multiplies bfloat16 and the codebook does not consist of lines: it is
        rounded then, whereas restoring W rounds the products with absmax.
    """
    if x.device.type == "cuda":
        scales = reference.scales_of(absmax, levels)
        return gpu.linear(x, codes, scales, codebook, None, block_size)
    return cpu.multiply(x, codes, absmax, codebook, block_size, levels, across)


def arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which to multiply x by a restored matrix.

    A CPU without units for a 16-bit dtype converts each number when it multiplies, which takes many
    times as long as converting the inputs once.
    """
    if x.device.type == "cpu" and x.dtype in cpu.DTYPES and x.dtype not in cpu.native_dtypes():
        return torch.float32
    return x.dtype


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for a restored weight, valid until the next call in the same thread.

    Reusing one buffer matters on a CPU: the operating system clears each page of new memory, which
    takes longer than restoring the weight. torch's CUDA allocator already reuses memory.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be used in training later
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        _scratch.buffer = buffer
    return buffer[:size].view(dtype).view(*shape)


def describe(device: torch.device) -> str:
    """Return the name of the implementation that restores weights on a device."""
    if device.type == "cpu" and _compiled_works():
        return f"compiled kernels ({cpu.instruction_set()})"
    if device.type in ("cpu", "cuda") and _bitsandbytes():
        return "bitsandbytes' operator"
    return "Triton" if gpu.is_available(device) else "plain torch"


def describe_products(device: torch.device, dtype: torch.dtype) -> str:
    """Return how products with frozen weights in short blocks are computed, for people."""
    named = describe(device)
    if device.type != "cpu" or not _compiled_works():
        return named
    x = torch.empty(0, dtype=dtype, device="cpu")
    forward, backward = (cpu.most_rows(x, 64, cpu.Kind.LINES, across) for across in (False, True))
    if min(forward, backward) >= 1 << 32:
        return f"{named}, directly from the codes"
    return (
        f"{named}, directly from the codes for up to {forward} tokens ({backward} for gradients), "
        "then with restored matrices"
    )


@functools.cache
def _compiled_works() -> bool:
    """Return whether the compiled kernels exist and match the reference on a small tensor."""
    if cpu.library() is None:
        return False
    weights = torch.linspace(-3.0, 2.0, 5001, device="cpu").sin()
    codebook = torch.linspace(-1.0, 1.0, 256, device="cpu")
    codebook[127] = 0.0
    lines = (torch.arange(256, device="cpu") - 128.0) / 128.0  # is decoded in another way
    results: dict[ModuleType, list[torch.Tensor]] = {cpu: [], reference: []}
    for module, found in results.items():
        for dtype, block_size, table in itertools.product(
            cpu.DTYPES, (32, 64, 2048), (codebook, lines)
        ):
            flat = weights.to(dtype)
            scales = module.absmax(flat, block_size)
            mass = module.histogram(flat, scales, scales.double().ceil(), block_size, 1024)
            boundaries = reference.exact_midpoints(table)
            codes = module.encode(flat, scales, boundaries, block_size)
            restored = module.dequantize(codes, scales, table, block_size, dtype)
            levels = torch.linspace(0.0, 3.0, 256, device="cpu")
            coded = (scales * 85).ceil().to(torch.uint8)
            coarse = module.dequantize(codes, coded, table, block_size, dtype, levels=levels)
            nearest = reference.nearest_values(table)
            searched = module.search_levels(flat, coded, levels, nearest, block_size, 8)
            found += [scales, mass, codes, restored, coarse, searched]
    agree = all(itertools.starmap(torch.equal, zip(*results.values(), strict=True)))
    if not agree:
        _logger.warning("the compiled CPU kernels disagree with the reference and are not used")
    return agree


@functools.cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes' operator, or None if bitsandbytes is not installed.

    Its `out` overload, which writes to a given tensor, exists for CUDA only.
    """
    try:
        import bitsandbytes  # noqa: F401 (defines the operator)
    except ImportError:
        return None
    return torch.ops.bitsandbytes.dequantize_blockwise
