"""Reference implementation of block-wise quantization in plain torch, for any device.

The faster implementations chosen by `gptj8.kernels.dispatch` return byte-identical results.
`gptj8.quantization.codec` checks the arguments. A weight tensor is a flat row of `n` numbers
(float32, float16 or bfloat16), split into blocks of `block_size`; the last block may be shorter.
`absmax` is float32 (blocks,), `codebook` float32 (256,) and `codes` uint8 (n,). If scales have 8
bits, `absmax` is uint8 (blocks,), the numbers of `levels`, float32 (256,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# Weights per piece. The float32 copies of one piece roughly fit into the CPU caches, and an
# embedding of 206 million weights is never copied to float32 as a whole.
_PIECE = 1 << 22

# Of `search_levels`. An error is counted in steps of 1 / SEARCH_UNIT of the scale, up to
# SEARCH_LIMIT steps, so that the squares of 128 errors fit into 32 bits.
LINES_BLOCK = 128
"""Longest block for which a fitted codebook consists of lines (`quantization.codebooks`)."""
SEARCH_CELLS = 4096
SEARCH_UNIT = 1 << 16
SEARCH_LIMIT = 4095


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the largest magnitude of each block; NaN or infinite if any weight in it is."""
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
    """Return a histogram of weights / absmax with equal bins over [-1, 1], weighted per block.

    Args:
        block_mass: float64 (blocks,), what each weight of a block adds to its bin. The values are
            integers, and their sum over all weights is below 2^53, so that the order of addition
            does not change the result.

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
    """Return the codes: the number of the 255 ascending boundaries below each weight / absmax."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for start, normalized in _normalized_pieces(flat, absmax, block_size):
        found = torch.bucketize(normalized, boundaries, out_int32=True)
        codes[start : start + found.numel()] = found.flatten()[: flat.numel() - start]
    return codes


def search_levels(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    nearest: torch.Tensor,
    block_size: int,
    candidates: int,
) -> torch.Tensor:
    """Return for each block the level with the smallest squared error: uint8 (blocks,).

    Tries the level of each block and the next higher ones. Errors are summed in integers, so that
    the choice does not depend on the order of addition; ties go to the lower level.

    Args:
        absmax: uint8 (blocks,), the lowest level that is not below any magnitude.
        nearest: float32 (SEARCH_CELLS,), the codebook value nearest to the center of each of the
            equal cells of [-1, 1].
        candidates: number of levels to try.
    """
    best = absmax.clone()
    lowest = torch.full(absmax.shape, torch.inf, dtype=torch.float64, device=absmax.device)
    for step in range(candidates):
        tried = (absmax.int() + step).clamp_(max=len(levels) - 1).to(torch.uint8)
        scales = scales_of(tried, levels)
        sums = []
        for start, normalized in _normalized_pieces(flat, scales, block_size):
            cell = ((normalized + 1.0) * (SEARCH_CELLS / 2)).to(torch.int32)
            value = nearest[cell.clamp_(0, SEARCH_CELLS - 1)]
            error = ((normalized - value) * SEARCH_UNIT).to(torch.int32)
            error = error.clamp_(-SEARCH_LIMIT, SEARCH_LIMIT)
            error.view(-1)[flat.numel() - start :] = 0  # the padding of a short last block
            sums.append((error * error).sum(1))
        total = torch.cat([absmax.new_zeros(0, dtype=torch.int64), *sums])
        squared = total.double() * (scales.double() * scales.double())
        better = squared < lowest
        best, lowest = torch.where(better, tried, best), torch.where(better, squared, lowest)
    return best


def scales_of(absmax: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    """Return the float32 scale of each block: absmax itself, or levels[absmax] if it has 8 bits."""
    return absmax if levels is None else levels.index_select(0, absmax.int())


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codebook[codes] * scale in the shape of the codes, a float32 product cast to
    `dtype`."""
    absmax = scales_of(absmax, levels)
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
    """Return the sums of (restored - weight)^2 and of weight^2 per block, each float64
    (blocks,)."""
    errors, norms = [], []
    for start in range(0, flat.numel(), _PIECE):
        original = flat[start : start + _PIECE].float()
        block = start // block_size
        scales = absmax[block : block + -(-original.numel() // block_size)]
        restored = dequantize(
            codes[start : start + _PIECE], scales, codebook, block_size, torch.float32
        )
        # The difference of two nearly equal float32 numbers is exact; its square needs float64.
        difference = _in_blocks(restored - original, block_size).double()
        errors.append(difference.square_().sum(1))
        norms.append(_in_blocks(original, block_size).double().square_().sum(1))
    nothing = torch.zeros(0, dtype=torch.float64, device=flat.device)
    return torch.cat([nothing, *errors]), torch.cat([nothing, *norms])


def exact_midpoints(codebook: torch.Tensor) -> torch.Tensor:
    """Return float32 (255,) boundaries: a float32 x exceeds one if and only if it exceeds the exact
    midpoint of the two neighboring codebook values."""
    exact = (codebook[1:].double() + codebook[:-1].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


def nearest_values(codebook: torch.Tensor) -> torch.Tensor:
    """Return the codebook value nearest to the center of each cell: float32 (SEARCH_CELLS,)."""
    cells = torch.arange(SEARCH_CELLS, dtype=torch.float32, device=codebook.device)
    centers = (cells + 0.5) / (SEARCH_CELLS / 2) - 1.0
    return codebook[torch.bucketize(centers, exact_midpoints(codebook))]


def _in_blocks(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the values as (blocks, block_size), the last block padded with zeros."""
    if short := -values.numel() % block_size:
        values = torch.nn.functional.pad(values, (0, short))
    return values.view(-1, block_size)


def _normalized_pieces(
    flat: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, weights / absmax) per piece, the quotients as float32 (blocks, block_size).

    A short last block is padded with zeros.
    """
    # Avoid 0 / 0 in a block of zeros.
    divisor = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    for start in range(0, flat.numel(), _PIECE):
        piece = _in_blocks(flat[start : start + _PIECE].float(), block_size)
        block = start // block_size
        yield start, piece / divisor[block : block + len(piece), None]
