"""Codebooks: the 256 values that a code can represent.

Weights are divided by the absmax of their block, so a codebook covers [-1, 1]. There are two kinds:

- `dynamic`: one fixed map for every tensor, dense near zero. It equals bitsandbytes' signed dynamic
  map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561), so
  models stored with that map keep their codes.
- `fitted`: the map that minimizes the squared error of one tensor (Lloyd, "Least squares
  quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960). Restoring a weight
  multiplies the error of the normalized weight by the block's absmax, so each block is weighted by
  its squared absmax. Fitting needs one histogram: Lloyd's iteration runs on its cumulative sums.

Every codebook contains an exact zero, so pruned weights and padding rows stay zero.
"""

from __future__ import annotations

import numpy as np
import torch

CODEBOOK_SIZE = 256

# Fine enough to increase the error by less than 1e-6 of it compared with exact cell sums, and small
# enough to stay in a CPU cache while 200 million weights are counted.
HISTOGRAM_BINS = 1 << 15
_LLOYD_ITERATIONS = 200


def dynamic_codebook() -> torch.Tensor:
    """Return the signed dynamic map: float32 (256,), ascending.

    A code consists of a sign, a decimal exponent in unary and a linear fraction in the remaining
    bits. Exponent 10^(i-6) has 2^i fractions, the midpoints of equal steps over [0.1, 1]. Zero and
    one complete the map.
    """
    exponents = 7
    values = [0.0, 1.0]
    for i in range(exponents):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        fractions = (steps[:-1] + steps[1:]) / 2.0
        scaled = ((10 ** (i - exponents + 1)) * fractions).tolist()
        values += scaled
        values += [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


def fit_codebook(mass: torch.Tensor) -> torch.Tensor:
    """Fit 256 values to a histogram with Lloyd's iteration; one of them is exactly zero.

    Args:
        mass: float64 (bins,) over [-1, 1]; see `reference.histogram`.

    Returns:
        float32 (256,), ascending. An empty histogram gives the dynamic map, which restores a tensor
        of zeros exactly.
    """
    counts = mass.numpy()  # NumPy is much faster than torch for arrays of 256 values
    if counts.sum() <= 0:
        return dynamic_codebook()
    edges = np.linspace(-1.0, 1.0, len(counts) + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    mass_below = np.concatenate([[0.0], counts.cumsum()])
    moment_below = np.concatenate([[0.0], (counts * centers).cumsum()])

    codebook = _starting_codebook(counts, edges)
    for _ in range(_LLOYD_ITERATIONS):
        boundaries = (codebook[1:] + codebook[:-1]) / 2
        lower, share = _locate(np.concatenate([[-1.0], boundaries, [1.0]]), len(counts))
        cell_mass = np.diff(_interpolate(mass_below, lower, share))
        cell_moment = np.diff(_interpolate(moment_below, lower, share))
        updated = np.divide(cell_moment, cell_mass, out=codebook.copy(), where=cell_mass > 0)
        updated[np.abs(codebook).argmin()] = 0.0
        updated = np.sort(updated.clip(-1.0, 1.0))
        if np.array_equal(updated, codebook):
            break
        codebook = updated
    return torch.from_numpy(codebook.astype(np.float32))


def _starting_codebook(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return 256 initial values, spaced by the cube root of the density.

    This is optimal for many levels (Panter and Dite, "Quantization distortion in pulse-count
    modulation", 1951), so Lloyd's iteration needs few steps.
    """
    window = 64  # smooth the density, because a histogram of few weights has empty bins
    below = np.concatenate([np.zeros(window // 2 + 1), counts.cumsum()])
    below = np.concatenate([below, np.full(window // 2, below[-1])])
    smooth = (below[window + 1 :] - below[: -window - 1]).clip(0.0)
    # Approximate the cube root with square roots, which are exactly rounded on every machine:
    # 1/4 + 1/16 + 1/64 is nearly 1/3.
    quarter = np.sqrt(np.sqrt(smooth))
    sixteenth = np.sqrt(np.sqrt(quarter))
    density = quarter * sixteenth * np.sqrt(np.sqrt(sixteenth))
    spread = np.concatenate([[0.0], density.cumsum()])
    wanted = (np.arange(CODEBOOK_SIZE) + 0.5) / CODEBOOK_SIZE
    index = np.searchsorted(spread / spread[-1], wanted).clip(1, len(edges) - 1)
    return edges[index - 1] / 2 + edges[index] / 2


def _locate(positions: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bin of each position in [-1, 1], and the position inside the bin in bin widths."""
    exact = (positions + 1.0) * (bins / 2)
    lower = np.minimum(exact.astype(np.int64), bins - 1)
    return lower, exact - lower


def _interpolate(running: np.ndarray, lower: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Interpolate a cumulative sum over [-1, 1] between the bin edges."""
    return running[lower] * (1 - share) + running[lower + 1] * share
