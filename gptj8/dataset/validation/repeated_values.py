"""Which values of a long array are there more than once."""

from __future__ import annotations

import numpy as np

_TOP, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return uint64 numbers of two halves, each below 2**32."""
    return (high.astype(np.uint64) << _TOP) | low.astype(np.uint64)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the halves of what `pack` returned, as int64."""
    return (packed >> _TOP).astype(np.int64), (packed & _LOW).astype(np.int64)


def either_side(same: np.ndarray) -> np.ndarray:
    """Return which elements equal a neighbour, given which of them equal the one before."""
    return np.concatenate([[False], same]) | np.concatenate([same, [False]])


def repeated(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur more than once, below 2**32, and their places, in that order.

    The place in the low half: sorting numbers is many times faster than sorting their order, and
    takes half the memory.
    """
    ordered = np.sort(pack(values, np.arange(len(values))))
    several = either_side((ordered[1:] >> _TOP) == (ordered[:-1] >> _TOP))
    return unpack(ordered[several[: len(ordered)]])
