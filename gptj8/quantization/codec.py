"""Block-wise 8-bit quantization of tensors: pure functions, exact, the same bytes everywhere.

A tensor is read as one row of numbers and cut into blocks; the last one may be shorter. A block
stores its largest magnitude (`absmax`), and each weight the index of the codebook value nearest to
weight / absmax:

    codes[i]  = argmin_k |codebook[k] - w[i] / absmax[i // block_size]|    (a tie takes the lower k)
    restored  = codebook[codes[i]] * absmax[i // block_size]               (float32, then rounded)

The nearest code is found exactly, by comparing with the midpoints of neighbouring values, rounded
so that no comparison in float32 can differ from one in exact arithmetic. (Rejected: bitsandbytes'
quantizers. On a CPU its table of 65,536 bins leaves seven codes unreachable, the one for zero among
them, and its CPU and CUDA results differ.) Division and comparison are correctly rounded on every
device, so codes do not depend on where they were made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gptj8.kernels import dispatch, reference
from gptj8.quantization.codebooks import (
    CODEBOOK_SIZE,
    HISTOGRAM_BINS,
    dynamic_codebook,
    fit_codebook,
)
from gptj8.runtime.errors import QuantizationError

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOKS = ("dynamic", "fitted")

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 8 bits.

    Attributes:
        codes: uint8, the tensor's shape.
        absmax: float32 (blocks,), the largest magnitude of each block.
        codebook: float32 (256,), ascending.
        block_size: weights a block.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    codebook: torch.Tensor
    block_size: int

    def __post_init__(self) -> None:
        check_quantized(self.codes, self.absmax, self.codebook, self.block_size)


def quantize_blockwise(
    weight: torch.Tensor,
    block_size: int = 4096,
    codebook: str | torch.Tensor = "fitted",
    name: str = "tensor",
) -> QuantizedTensor:
    """Quantize a tensor.

    Args:
        weight: any shape, float32, float16 or bfloat16, on any device.
        block_size: 64 to 4096, a power of two.
        codebook: "fitted", "dynamic", or 256 ascending finite float32 values.
        name: what errors call the tensor.

    Raises:
        QuantizationError: for a wrong dtype, block size or codebook, and for NaN or infinity, with
            the index of the first one.
    """
    check_block_size(block_size)
    if weight.dtype not in _FLOAT_DTYPES:
        raise QuantizationError(f"{name}: dtype {weight.dtype} is not float32, float16 or bfloat16")
    flat = _flat(weight)
    absmax = dispatch.backend(flat).absmax(flat, block_size)
    _refuse_non_finite(weight, absmax, name)
    if isinstance(codebook, torch.Tensor):
        table = check_codebook(codebook, name)
    elif codebook == "dynamic":
        table = dynamic_codebook()
    elif codebook == "fitted":
        table = _fit(flat, absmax, block_size)
    else:
        raise QuantizationError(f"{name}: codebook {codebook!r} is none of {', '.join(CODEBOOKS)}")
    # A copy: tensors that share memory cannot be saved, and no caller may change another's table.
    table = table.to(weight.device, copy=True)
    codes = dispatch.backend(flat).encode(
        flat, absmax, reference.exact_midpoints(table), block_size
    )
    return QuantizedTensor(codes.view(weight.shape), absmax, table, block_size)


def dequantize_blockwise(
    quantized: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Restore a tensor.

    Returns:
        `dtype` (float32, float16 or bfloat16), the shape and device of the codes: the float32
        product of codebook value and absmax, rounded to nearest.
    """
    return dispatch.dequantize(
        quantized.codes,
        quantized.absmax,
        quantized.codebook,
        quantized.block_size,
        dtype,
    )


def squared_errors(weight: torch.Tensor, quantized: QuantizedTensor) -> tuple[float, float]:
    """Return the sums of squared error and squared weight, float64. Their quotient's root is the
    relative RMS error, and sums of several tensors add up to the error of all."""
    if weight.shape != quantized.codes.shape:
        raise QuantizationError(
            f"the weight has shape {tuple(weight.shape)}, its codes {tuple(quantized.codes.shape)}"
        )
    flat = _flat(weight)
    errors, norms = dispatch.backend(flat).squared_errors(
        flat,
        quantized.codes.reshape(-1),
        quantized.absmax,
        quantized.codebook,
        quantized.block_size,
    )
    return float(errors.sum()), float(norms.sum())


def check_block_size(block_size: int) -> None:
    """Raise QuantizationError unless the block size is one that every backend supports."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise QuantizationError(f"block_size = {block_size!r} is none of {sizes}")


def check_codebook(codebook: torch.Tensor, name: str = "tensor") -> torch.Tensor:
    """Return the codebook as float32, or raise QuantizationError saying what is wrong with it."""
    if tuple(codebook.shape) != (CODEBOOK_SIZE,):
        raise QuantizationError(
            f"{name}: the codebook has shape {tuple(codebook.shape)}, not ({CODEBOOK_SIZE},)"
        )
    if not codebook.is_floating_point():
        raise QuantizationError(f"{name}: the codebook's dtype is {codebook.dtype}, not float32")
    codebook = codebook.detach().float()
    finite = torch.isfinite(codebook)
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise QuantizationError(f"{name}: codebook[{at}] = {float(codebook[at])} is not finite")
    falling = codebook[1:] < codebook[:-1]
    if bool(falling.any()):
        at = int(falling.nonzero()[0])
        raise QuantizationError(
            f"{name}: the codebook is not ascending: codebook[{at}] = {float(codebook[at])!r}, "
            f"codebook[{at + 1}] = {float(codebook[at + 1])!r}"
        )
    return codebook


def check_quantized(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    name: str = "tensor",
) -> None:
    """Raise QuantizationError unless the three tensors belong together."""
    check_block_size(block_size)
    if codes.dtype != torch.uint8:
        raise QuantizationError(f"{name}: codes are {codes.dtype}, not torch.uint8")
    blocks = math.ceil(codes.numel() / block_size)
    if tuple(absmax.shape) != (blocks,):
        raise QuantizationError(
            f"{name}: absmax has shape {tuple(absmax.shape)}, and {codes.numel()} codes in blocks "
            f"of {block_size} need ({blocks},)"
        )
    if absmax.dtype != torch.float32:
        raise QuantizationError(f"{name}: absmax is {absmax.dtype}, not torch.float32")
    if codebook.dtype != torch.float32:
        raise QuantizationError(f"{name}: the codebook is {codebook.dtype}, not torch.float32")
    if codebook.device.type != "meta":
        check_codebook(codebook, name)
        if not bool(torch.isfinite(absmax).all()):
            at = int((~torch.isfinite(absmax)).nonzero()[0])
            raise QuantizationError(f"{name}: absmax[{at}] = {float(absmax[at])} is not finite")


def _flat(weight: torch.Tensor) -> torch.Tensor:
    # A view may be strided, and negative only by a flag; kernels read memory as it is.
    return weight.detach().resolve_neg().reshape(-1).contiguous()


def _refuse_non_finite(weight: torch.Tensor, absmax: torch.Tensor, name: str) -> None:
    # The largest magnitude of a block is NaN or infinite if any of its weights is.
    if bool(torch.isfinite(absmax).all()):
        return
    position = (~torch.isfinite(weight)).nonzero()[0].tolist()
    value = float(weight[tuple(position)])
    raise QuantizationError(f"{name}{position} = {value} cannot be quantized")


def _fit(flat: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    largest = absmax.max() if absmax.numel() else absmax.new_zeros(())
    if float(largest) == 0.0:
        return dynamic_codebook()
    # Squares relative to the largest block's, which cannot overflow, as whole numbers whose sum
    # over all weights stays below 2^53: sums of those are exact, and so the codebook is the same
    # whatever device or thread adds them up in whatever order.
    unit = 2.0 ** (52 - math.ceil(math.log2(flat.numel())))
    block_mass = (absmax / largest).double().square().mul_(unit).round_()
    return fit_codebook(
        dispatch.backend(flat).histogram(flat, absmax, block_mass, block_size, HISTOGRAM_BINS).cpu()
    )
