"""Block-wise 8-bit quantization of tensors as pure functions, byte-identical on every device.

A tensor is flattened and split into blocks; the last block may be shorter. Each block has a scale,
and each weight stores the index of the codebook value nearest to weight / scale:

    codes[i]  = argmin_k |codebook[k] - w[i] / scale[i // block_size]|    (ties: the lower k)
    restored  = codebook[codes[i]] * scale[i // block_size]               (float32, then rounded)

The scale is the block's largest magnitude (`absmax`, float32), or that value rounded up to one of
256 levels, which needs only 8 bits (`absmax` is then the number of the level). See
`gptj8.quantization.scales`.

The nearest code is exact. Quotients are compared with the midpoints of neighboring codebook values,
rounded such that a float32 comparison always agrees with exact arithmetic. Division is correctly
rounded on every device, so the codes do not depend on the device.

Alternative considered: bitsandbytes' quantizers; they were rejected because their CPU version, a
table of 65,536 bins, never produces seven of the codes, including the one for zero, and because
their CPU and CUDA results differ.
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
from gptj8.quantization.scales import LEVELS, encode_scales, fit_levels
from gptj8.runtime.errors import QuantizationError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOKS = ("dynamic", "fitted")
SCALE_BITS = (8, 32)

# Levels that are tried per block, from the lowest one that covers it. More take longer and gain
# little: with 8, 12 and 16, an embedding in blocks of 32 has 15, 17 and 18 % less squared error.
SEARCHED_LEVELS = 8

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedTensor:
    """An 8-bit tensor.

    Attributes:
        codes: uint8, in the shape of the tensor.
        absmax: float32 (blocks,), the largest magnitude of each block; or uint8 (blocks,), the
            number of its level.
        codebook: float32 (256,), ascending.
        block_size: weights per block.
        levels: float32 (256,), ascending, if absmax is uint8; otherwise None.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    codebook: torch.Tensor
    block_size: int
    levels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_quantized(self.codes, self.absmax, self.codebook, self.block_size, levels=self.levels)

    @property
    def scales(self) -> torch.Tensor:
        """float32 (blocks,), the factor of each block."""
        return reference.scales_of(self.absmax, self.levels)


def quantize_blockwise(
    weight: torch.Tensor,
    block_size: int = 4096,
    codebook: str | torch.Tensor = "fitted",
    name: str = "tensor",
    scale_bits: int = 32,
) -> QuantizedTensor:
    """Quantize a tensor.

    Args:
        weight: any shape, float32, float16 or bfloat16, on any device.
        block_size: a power of two from 32 to 4096.
        codebook: "fitted", "dynamic", or 256 ascending finite float32 values.
        name: name of the tensor in error messages.
        scale_bits: 32 for exact scales, or 8 for scales rounded up to one of 256 levels.

    Raises:
        QuantizationError: if the dtype, block size or codebook is invalid, or if a weight is NaN or
            infinite; the message contains the index of the first such weight.
    """
    check_block_size(block_size)
    check_scale_bits(scale_bits)
    if weight.dtype not in _FLOAT_DTYPES:
        raise QuantizationError(f"{name}: dtype {weight.dtype} is not float32, float16 or bfloat16")
    flat = _flat(weight)
    absmax = dispatch.backend(flat).absmax(flat, block_size)
    _check_finite(weight, absmax, name)
    levels = None
    scales = absmax
    if scale_bits == 8:
        levels = fit_levels(absmax)
        absmax = encode_scales(absmax, levels)
        scales = reference.scales_of(absmax, levels)
    if isinstance(codebook, torch.Tensor):
        table = check_codebook(codebook, name)
    elif codebook == "dynamic":
        table = dynamic_codebook()
    elif codebook == "fitted":
        table = _fit(flat, scales, block_size)
    else:
        raise QuantizationError(
            f"{name}: codebook = {codebook!r} is not one of {', '.join(CODEBOOKS)}"
        )
    # Copy it: tensors that share memory cannot be saved, and a caller may change its own codebook.
    table = table.to(weight.device, copy=True)
    if levels is not None:
        absmax = dispatch.backend(flat).search_levels(
            flat, absmax, levels, reference.nearest_values(table), block_size, SEARCHED_LEVELS
        )
        scales = reference.scales_of(absmax, levels)
    codes = dispatch.backend(flat).encode(
        flat, scales, reference.exact_midpoints(table), block_size
    )
    return QuantizedTensor(codes.view(weight.shape), absmax, table, block_size, levels)


def dequantize_blockwise(
    quantized: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Restore a tensor.

    Returns:
        A tensor of `dtype` with the shape and device of the codes: the float32 product of codebook
        value and scale, rounded to nearest.
    """
    return dispatch.dequantize(
        quantized.codes,
        quantized.absmax,
        quantized.codebook,
        quantized.block_size,
        dtype,
        levels=quantized.levels,
    )


def squared_errors(weight: torch.Tensor, quantized: QuantizedTensor) -> tuple[float, float]:
    """Return the sums of squared errors and of squared weights, computed in float64.

    The square root of their quotient is the relative RMS error. For the error over several tensors,
    add up the sums first.

    Raises:
        QuantizationError: if the two shapes differ.
    """
    if weight.shape != quantized.codes.shape:
        raise QuantizationError(
            f"the weight has shape {tuple(weight.shape)}, but the codes have shape "
            f"{tuple(quantized.codes.shape)}"
        )
    flat = _flat(weight)
    errors, norms = dispatch.backend(flat).squared_errors(
        flat,
        quantized.codes.reshape(-1),
        quantized.scales,
        quantized.codebook,
        quantized.block_size,
    )
    return float(errors.sum()), float(norms.sum())


def check_block_size(block_size: int, name: str = "block_size") -> None:
    """Raise QuantizationError, with the setting's name, unless every backend supports the size."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise QuantizationError(f"{name} = {block_size!r} is not one of {sizes}")


def check_scale_bits(scale_bits: int) -> None:
    """Raise QuantizationError unless scales of this size are supported."""
    if type(scale_bits) is not int or scale_bits not in SCALE_BITS:
        raise QuantizationError(f"scale_bits = {scale_bits!r} is not one of 8, 32")


def check_codebook(codebook: torch.Tensor, name: str = "tensor") -> torch.Tensor:
    """Return the codebook as float32.

    Raises:
        QuantizationError: if it does not consist of 256 ascending finite values.
    """
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
    levels: torch.Tensor | None = None,
) -> None:
    """Raise QuantizationError unless dtypes, shapes and values form a valid quantized tensor."""
    check_block_size(block_size)
    if codes.dtype != torch.uint8:
        raise QuantizationError(f"{name}: codes are {codes.dtype}, not torch.uint8")
    blocks = math.ceil(codes.numel() / block_size)
    if tuple(absmax.shape) != (blocks,):
        raise QuantizationError(
            f"{name}: absmax has shape {tuple(absmax.shape)}, but {codes.numel()} codes in blocks "
            f"of {block_size} need shape ({blocks},)"
        )
    wanted = torch.float32 if levels is None else torch.uint8
    if absmax.dtype != wanted:
        raise QuantizationError(f"{name}: absmax is {absmax.dtype}, not {wanted}")
    if codebook.dtype != torch.float32:
        raise QuantizationError(f"{name}: the codebook is {codebook.dtype}, not torch.float32")
    if levels is not None and (levels.dtype, tuple(levels.shape)) != (torch.float32, (LEVELS,)):
        raise QuantizationError(
            f"{name}: levels are {levels.dtype} of shape {tuple(levels.shape)}, not torch.float32 "
            f"of shape ({LEVELS},)"
        )
    if codebook.device.type != "meta":
        check_codebook(codebook, name)
        factors, kind = (absmax, "absmax") if levels is None else (levels, "levels")
        if not bool(torch.isfinite(factors).all()):
            at = int((~torch.isfinite(factors)).nonzero()[0])
            raise QuantizationError(f"{name}: {kind}[{at}] = {float(factors[at])} is not finite")


def _flat(weight: torch.Tensor) -> torch.Tensor:
    # A view may be strided or lazily negated, but kernels read raw memory.
    return weight.detach().resolve_neg().reshape(-1).contiguous()


def _check_finite(weight: torch.Tensor, absmax: torch.Tensor, name: str) -> None:
    # absmax is NaN or infinite if any weight of the block is.
    if bool(torch.isfinite(absmax).all()):
        return
    position = (~torch.isfinite(weight)).nonzero()[0].tolist()
    value = float(weight[tuple(position)])
    raise QuantizationError(f"{name}{position} = {value} is not finite and cannot be quantized")


def _fit(flat: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    largest = absmax.max() if absmax.numel() else absmax.new_zeros(())
    if float(largest) == 0.0:
        return dynamic_codebook()
    # Each block's mass is its squared absmax relative to the largest one, which cannot overflow. It
    # is scaled and rounded to an integer such that the sum over all weights stays below 2^53. Such
    # sums are exact, so the codebook does not depend on the device or the order of addition.
    unit = 2.0 ** (52 - math.ceil(math.log2(flat.numel())))
    block_mass = (absmax / largest).double().square().mul_(unit).round_()
    mass = dispatch.backend(flat).histogram(flat, absmax, block_mass, block_size, HISTOGRAM_BINS)
    return fit_codebook(mass.cpu(), in_lines=block_size <= reference.LINES_BLOCK)
