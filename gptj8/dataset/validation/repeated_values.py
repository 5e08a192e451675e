"""Find the values that occur more than once in a long array."""

from __future__ import annotations

import numpy as np

_TOP, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return uint64 numbers packed from two halves, each below 2**32."""
    return (high.astype(np.uint64) << _TOP) | low.astype(np.uint64)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two halves of numbers from `pack`, as int64."""
    return (packed >> _TOP).astype(np.int64), (packed & _LOW).astype(np.int64)


def either_side(same: np.ndarray) -> np.ndarray:
    """Return which elements equal the one before or after.

    Args:
        same: (n - 1,) whether each element after the first equals the one before.
    """
    return np.concatenate([[False], same]) | np.concatenate([same, [False]])


def repeated(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur more than once and their positions, sorted by both.

    Values must be below 2**32. Each value is packed with its position in the low half, because
    sorting numbers is many times faster than sorting indices and takes half the memory.
    """
    ordered = np.sort(pack(values, np.arange(len(values))))
    several = either_side((ordered[1:] >> _TOP) == (ordered[:-1] >> _TOP))
    return unpack(ordered[several[: len(ordered)]])
