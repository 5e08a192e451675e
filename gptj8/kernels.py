"""The fastest dequantization at hand, bit-equal to `codec.dequantize`.

bitsandbytes' operator serves CPU and CUDA; without the package, or on another device, the pure
torch reference does. Chosen per call by device, imported once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from gptj8 import codec


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `codec.dequantize`."""
    if codes.device.type in ("cpu", "cuda") and codes.numel() and (native := _bitsandbytes()):
        return native(codes, absmax, codebook, block_size, dtype)
    return codec.dequantize(codes, absmax, codebook, block_size, dtype)


@functools.cache
def _bitsandbytes() -> Callable[..., torch.Tensor] | None:
    try:
        import bitsandbytes  # noqa: F401 (defines the operator)
    except ImportError:
        return None
    return torch.ops.bitsandbytes.dequantize_blockwise.default
