"""Codebooks: the 256 values that a code can represent.

Weights are divided by the absmax of their block, so a codebook covers [-1, 1]. There are two kinds:

- `dynamic`: one fixed map for every tensor, dense near zero. It equals bitsandbytes' signed dynamic
  map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561), so
  models stored with that map keep their codes.
- `fitted`: the map that minimizes the squared error of one tensor (Lloyd, "Least squares
  quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960). Restoring a weight
  multiplies the error of the normalized weight by the block's absmax, so each block is weighted by
  its squared absmax. Fitting needs one histogram: Lloyd's iteration runs on its cumulative sums.

For blocks of up to `LINES_BLOCK` weights the fitted map consists of 16 lines: the upper four bits
of a code select a line and the lower four a step on it, value[16 h + l] = start[h] + slope[h] * l.
Kernels then decode a code with 16-entry byte shuffles and exact integers. A table of 256 values
needs a gather for each code, which is slow on CPUs without AVX-512. The values are stored as
before, so the format of a model does not change. For normal, Laplace and Student t(4) weights in
blocks of 32 to 128 with 8-bit scales, lines change the error by -1.1 to +0.5 %; in blocks of 4096
they would add 2.6 %, so longer blocks keep a freely fitted map. Parabolas instead of lines gain at
most 0.5 % in short blocks and take half as many instructions again.

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
# Starts and slopes are integers in this unit, with slopes up to 255: a byte, and products that fit
# into 16 bits. LINE_UNIT of the kernels (common.h) must equal it.
_LINE_UNIT = 8192
_LINE = 16  # values per line
_STEEPEST = 255


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


def fit_codebook(mass: torch.Tensor, in_lines: bool = False) -> torch.Tensor:
    """Fit 256 values to a histogram with Lloyd's iteration; one of them is exactly zero.

    Args:
        mass: float64 (bins,) over [-1, 1]; see `reference.histogram`.
        in_lines: whether the values must form 16 lines.

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
    for steps in (_free_step, _step_on_lines) if in_lines else (_free_step,):
        for _ in range(_LLOYD_ITERATIONS):
            boundaries = (codebook[1:] + codebook[:-1]) / 2
            lower, share = _locate(np.concatenate([[-1.0], boundaries, [1.0]]), len(counts))
            cell_mass = np.diff(_interpolate(mass_below, lower, share))
            cell_moment = np.diff(_interpolate(moment_below, lower, share))
            means = np.divide(cell_moment, cell_mass, out=codebook.copy(), where=cell_mass > 0)
            updated = steps(means, codebook, cell_mass)
            if np.array_equal(updated, codebook):
                break
            codebook = updated
    return torch.from_numpy(codebook.astype(np.float32))


def _free_step(means: np.ndarray, codebook: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Return the next codebook: the mean of each cell, and zero for the value nearest to it."""
    means[np.abs(codebook).argmin()] = 0.0
    return np.sort(means.clip(-1.0, 1.0))


def _step_on_lines(means: np.ndarray, _: np.ndarray, cell_mass: np.ndarray) -> np.ndarray:
    """Return the lines nearest to the means, by least squares weighted with the cells' mass."""
    steps = np.arange(float(_LINE))
    # Empty cells get a small weight, so that a line of empty cells stays where it is.
    weight = (cell_mass + 1e-9 * cell_mass.max()).reshape(-1, _LINE)
    wanted = means.reshape(-1, _LINE) * _LINE_UNIT
    total = _sums(weight)
    middle, height = _sums(weight * steps) / total, _sums(weight * wanted) / total
    offset = steps - middle[:, None]
    slope = _sums(weight * offset * (wanted - height[:, None])) / _sums(weight * offset * offset)
    slope = np.rint(slope).clip(0, _STEEPEST).astype(np.int64)
    start = np.rint(height - slope * middle).astype(np.int64)
    return _ascending(start, slope).reshape(-1) / _LINE_UNIT


def _ascending(start: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the values on lines, int64 (16, 16), moved so that one is zero and none is lower than
    the one before it."""
    steps, last = np.arange(_LINE), _LINE - 1
    values = start[:, None] + slope[:, None] * steps
    line, step = divmod(int(np.abs(values).argmin()), _LINE)
    slope[line] = min(slope[line], _LINE_UNIT // last)
    start[line] = -slope[line] * step
    for h in range(line + 1, len(start)):  # upwards: begin after the line before, end at one
        start[h] = min(max(start[h], start[h - 1] + last * slope[h - 1]), _LINE_UNIT)
        slope[h] = min(slope[h], (_LINE_UNIT - start[h]) // last)
    for h in range(line - 1, -1, -1):  # downwards: end before the line after, begin at minus one
        end = min(start[h] + last * slope[h], start[h + 1])
        end = max(end, -_LINE_UNIT)
        slope[h] = min(slope[h], (end + _LINE_UNIT) // last)
        start[h] = end - last * slope[h]
    return start[:, None] + slope[:, None] * steps


def _sums(rows: np.ndarray) -> np.ndarray:
    """Return the sum of each row, added from left to right on every machine."""
    return rows.cumsum(axis=1)[:, -1]


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
