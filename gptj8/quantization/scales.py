"""Scales in 8 bits: 256 levels per tensor, spaced logarithmically.

A scale is rounded up to the next level, so no weight of the block exceeds it. Levels cost one byte
per block instead of four, so that blocks can be a quarter as long for the same size, which reduces
the error far more than the rounding of the scales adds. The idea of quantizing the scales is from
QLoRA (Dettmers et al., 2023, arXiv:2305.14314), which rounds to nearest instead.

Only operations that IEEE 754 rounds correctly are used, so every machine computes the same levels.
"""

from __future__ import annotations

import math

import torch

LEVELS = 256
# Blocks with smaller scales than this share of the largest one hardly contribute to the tensor, and
# covering them would widen the gaps between all levels.
_SMALLEST = 2.0**-24


def fit_levels(absmax: torch.Tensor) -> torch.Tensor:
    """Return the levels between the smallest and the largest scale: float32 (256,), ascending.

    Args:
        absmax: float32 (blocks,), finite and not negative.
    """
    positive = absmax[absmax > 0]
    if not positive.numel():
        return absmax.new_zeros(LEVELS)
    largest = float(positive.max())
    step = max(float(positive.min()) / largest, _SMALLEST)
    for _ in range(8):
        step = math.sqrt(step)  # after eight times, 256 steps lead from the largest to the smallest
    values, factor = [], 1.0
    for _ in range(LEVELS):
        values.append(largest * factor)
        factor *= step
    return torch.tensor(values[::-1], dtype=torch.float32, device=absmax.device)


def encode_scales(absmax: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the number of the lowest level that is not below each scale: uint8 (blocks,)."""
    return torch.bucketize(absmax, levels, out_int32=True).to(torch.uint8)
