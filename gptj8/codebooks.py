"""The 256 values that a code can stand for.

Weights are divided by their block's largest magnitude, so a codebook covers [-1, 1]. Two kinds:

- `dynamic`: one fixed map for every tensor, dense near zero. bitsandbytes' signed dynamic map
  (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561), value for
  value, so that models stored by it keep their codes.
- `fitted`: the map that minimizes the squared error of one tensor (Lloyd, "Least squares
  quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960). An error in the
  normalized weight is multiplied by the block's absmax when the weight is restored, so blocks count
  by absmax squared. It costs one histogram: Lloyd's iteration runs on its running sums.

Every codebook holds an exact zero: pruned weights and padding rows stay zero.
"""

from __future__ import annotations

import torch

CODEBOOK_SIZE = 256

# Fine enough that the loss against exact cell sums is below 1e-6 of the error, small enough to sit
# in a CPU cache while 200 million weights are counted.
HISTOGRAM_BINS = 1 << 15
_LLOYD_ITERATIONS = 200


def dynamic_codebook() -> torch.Tensor:
    """Return the signed dynamic map: float32 (256,), ascending.

    A code has a sign, a decimal exponent in unary and a linear fraction in the bits that are left.
    Exponent 10^(i-6) gets 2^i fractions, the midpoints of equal steps over [0.1, 1]; zero and one
    complete the map.
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
    """Fit 256 ascending values to a histogram by Lloyd's iteration, one of them exactly zero.

    Args:
        mass: (bins,) float64 over [-1, 1], see `blockwise.histogram`.

    Returns:
        float32 (256,), ascending. A tensor of zeros gets the dynamic map, which restores it
        exactly.
    """
    total = mass.sum()
    if total <= 0:
        return dynamic_codebook()
    bins = mass.numel()
    edges = torch.linspace(-1.0, 1.0, bins + 1, dtype=torch.float64)
    mass_below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    centers = (edges[1:] + edges[:-1]) / 2
    moment_below = torch.cat([mass.new_zeros(1), (mass * centers).cumsum(0)])

    codebook = _starting_codebook(mass, edges)
    for _ in range(_LLOYD_ITERATIONS):
        zero = int(codebook.abs().argmin())
        boundaries = (codebook[1:] + codebook[:-1]) / 2
        cells = torch.cat([edges[:1], boundaries, edges[-1:]])
        mass_at, moment_at = _interpolate(cells, mass_below), _interpolate(cells, moment_below)
        cell_mass, cell_moment = mass_at.diff(), moment_at.diff()
        updated = torch.where(cell_mass > 0, cell_moment / cell_mass.clamp_min(1e-300), codebook)
        updated[zero] = 0.0
        updated = updated.clamp(-1.0, 1.0).sort().values
        if torch.equal(updated, codebook):
            break
        codebook = updated
    return codebook.float()


def _starting_codebook(mass: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Spread values by the cube root of the density, the optimum for many levels (Panter and Dite,
    "Quantization distortion in pulse-count modulation", 1951), from which Lloyd needs few steps."""
    window = 64  # a smooth density: a histogram of few weights has empty bins
    smooth = torch.nn.functional.avg_pool1d(
        mass[None, None], window + 1, stride=1, padding=window // 2, count_include_pad=False
    )[0, 0]
    spread = smooth.pow(1 / 3).cumsum(0)
    spread = torch.cat([spread.new_zeros(1), spread]) / spread[-1]
    wanted = (torch.arange(CODEBOOK_SIZE, dtype=torch.float64) + 0.5) / CODEBOOK_SIZE
    index = torch.searchsorted(spread, wanted).clamp(1, len(edges) - 1)
    return edges[index - 1] / 2 + edges[index] / 2


def _interpolate(positions: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """Read a running sum over [-1, 1] between its bins' edges."""
    bins = running.numel() - 1
    exact = (positions.clamp(-1.0, 1.0) + 1.0) * (bins / 2)
    lower = exact.floor().long().clamp_(0, bins - 1)
    share = exact - lower
    return running[lower] * (1 - share) + running[lower + 1] * share
