"""The arithmetic of block-wise quantization in plain torch, on any device: the reference.

Every faster way (`gptj8.kernels.dispatch`) gives the same bytes as these functions. Arguments are
checked by `gptj8.quantization.codec`. A tensor is one row of `n` numbers (float32, float16 or
bfloat16) in blocks of `block_size`, the last of which may be shorter; `absmax` is float32
(blocks,), `codebook` float32 (256,), `codes` uint8 (n,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# Weights handled at a time: the float32 copies of a piece stay near the CPU's caches, and an
# embedding of 206 million weights never has a float32 copy of its own.
_PIECE = 1 << 22


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return each block's largest magnitude; NaN or infinite if any of its weights is."""
    pieces = []
    for start in range(0, flat.numel(), _PIECE):
        piece = _in_blocks(flat[start : start + _PIECE].abs(), block_size)
        pieces.append(piece.amax(dim=1).float())
    return torch.cat(pieces) if pieces else flat.new_empty(0, dtype=torch.float32)


def histogram(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    block_mass: torch.Tensor,
    block_size: int,
    bins: int,
) -> torch.Tensor:
    """Count weights / absmax in equal bins over [-1, 1], each block by its own mass.

    Args:
        block_mass: float64 (blocks,), whole numbers, so small that the sum over all weights is
            below 2^53: then no order of adding them changes a sum.

    Returns:
        float64 (bins,).
    """
    mass = torch.zeros(bins, dtype=torch.float64, device=flat.device)
    for start, normalized in _normalized_pieces(flat, absmax, block_size):
        block = start // block_size
        index = ((normalized + 1.0) * (bins / 2)).to(torch.int32).clamp_(max=bins - 1)
        each = block_mass[block : block + len(index), None].expand(index.shape)
        taken = min(flat.numel() - start, index.numel())
        mass += torch.bincount(
            index.flatten()[:taken], weights=each.flatten()[:taken], minlength=bins
        )
    return mass


def encode(
    flat: torch.Tensor, absmax: torch.Tensor, boundaries: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return how many of the 255 ascending float32 boundaries are below each weight / absmax."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for start, normalized in _normalized_pieces(flat, absmax, block_size):
        found = torch.bucketize(normalized, boundaries, out_int32=True)
        codes[start : start + found.numel()] = found.flatten()[: flat.numel() - start]
    return codes


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return codebook[codes] * absmax, a float32 product rounded to `dtype`; the codes' shape."""
    values = torch.index_select(codebook, 0, codes.reshape(-1).int())
    whole = codes.numel() // block_size * block_size
    blocks = values[:whole].view(-1, block_size)
    blocks *= absmax[: blocks.shape[0], None]
    if whole < codes.numel():
        values[whole:] *= absmax[-1]
    return values.to(dtype).view(codes.shape)


def squared_errors(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 (blocks,) twice: the sums of (restored - weight)^2 and of weight^2."""
    errors, norms = [], []
    for start in range(0, flat.numel(), _PIECE):
        original = flat[start : start + _PIECE].float()
        block = start // block_size
        scales = absmax[block : block + -(-original.numel() // block_size)]
        restored = dequantize(
            codes[start : start + _PIECE], scales, codebook, block_size, torch.float32
        )
        # A difference of near-equal float32 numbers is exact; its square is summed in float64.
        difference = _in_blocks(restored - original, block_size).double()
        errors.append(difference.square_().sum(1))
        norms.append(_in_blocks(original, block_size).double().square_().sum(1))
    nothing = torch.zeros(0, dtype=torch.float64, device=flat.device)
    return torch.cat([nothing, *errors]), torch.cat([nothing, *norms])


def exact_midpoints(codebook: torch.Tensor) -> torch.Tensor:
    """Return float32 (255,): for a float32 x, x > midpoint exactly if x > the value returned."""
    exact = (codebook[1:].double() + codebook[:-1].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


def _in_blocks(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return (blocks, block_size), the last block padded with zeros."""
    if short := -values.numel() % block_size:
        values = torch.nn.functional.pad(values, (0, short))
    return values.view(-1, block_size)


def _normalized_pieces(
    flat: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, weights / absmax as float32 (blocks, block_size)); a short last block is padded
    with zeros."""
    # A block of zeros would divide 0 by 0.
    divisor = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    for start in range(0, flat.numel(), _PIECE):
        piece = _in_blocks(flat[start : start + _PIECE].float(), block_size)
        block = start // block_size
        yield start, piece / divisor[block : block + len(piece), None]
