"""How much memory the C library's heap holds for the tensors that live in it: glibc, in outline.

Blocks above a threshold are mapped one by one and go back to the system as they are freed. The
threshold grows to the largest block freed so far, up to 32 MiB; what is smaller is cut out of one
heap, and there three habits of glibc meet:

- torch asks for addresses that 64 divides, and glibc then looks for 96 bytes more than it uses;
- what is left over before it is at once given to some small object, of which every tensor has
  several, so that two holes beside each other stay two;
- so the hole that a tensor leaves is often too small for another one of its size.

A heap of activations is therefore two or three times as large as what lives in it. With a fixed
threshold (`runtime.keep_large_blocks_out_of_the_heap`) nearly nothing is.
"""

from __future__ import annotations

from bisect import bisect_left, insort

_PAGE = 4096
_MOST = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX
_LEAST = 128 << 10
_ALIGNMENT = 64
_SPARE = 96  # the alignment, and the least that is a chunk
_PINNED = 1024  # a remainder below this is no hole of its own


class Heap:
    """A heap, told of blocks that come and go.

    Args:
        threshold: blocks of so many bytes and more are mapped; None: as glibc adapts it.

    Attributes:
        resident: bytes that it holds of the system's memory now.
        peak: the most that these were.
        live: bytes of the blocks themselves.
    """

    def __init__(self, threshold: int | None = None) -> None:
        self._adapts = threshold is None
        self._threshold = threshold or _LEAST
        self._trim = _LEAST
        self._chunks: dict[int, tuple[int, int]] = {}  # address -> size, bytes asked for
        self._holes: dict[int, int] = {}
        self._hole_ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._mapped: dict[int, tuple[int, int]] = {}
        self._mapped_bytes = self._top = self._end = self._touched = 0
        self._next_mapped = -1
        self.live = self.peak = 0

    @property
    def resident(self) -> int:
        return min(self._touched, self._end) + self._mapped_bytes

    def allocate(self, size: int) -> int:
        """Return the address of a new block."""
        self.live += size
        need = (size + 8 + 15) // 16 * 16
        asked = need + _SPARE
        index = bisect_left(self._by_size, (asked, -1))
        if index < len(self._by_size):
            found, start = self._by_size[index]
            self._remove(start)
        else:
            if self._end - self._top < asked + 32:
                if asked >= self._threshold:
                    return self._map(size, asked)
                self._end = -(-(self._top + asked + _LEAST) // _PAGE) * _PAGE
            found, start = asked, self._top
            self._top += asked
        lead = -(start + 16) % _ALIGNMENT
        rest = found - lead - need
        start += lead
        if rest >= _PINNED:
            self._add(start + need, rest)
        else:
            need += rest
        self._chunks[start] = need, size
        self._touched = max(self._touched, start + need)
        self.peak = max(self.peak, self.resident)
        return start

    def free(self, address: int) -> None:
        """Take a block back."""
        if address < 0:
            mapped, size = self._mapped.pop(address)
            self._mapped_bytes -= mapped
            self.live -= size
            if self._adapts and self._threshold < mapped <= _MOST:
                self._threshold, self._trim = mapped, 2 * mapped
            return
        need, size = self._chunks.pop(address)
        self.live -= size
        self._add(address, need)
        if self._end - self._top >= self._trim:
            self._end = -(-(self._top + _LEAST) // _PAGE) * _PAGE
            self._touched = min(self._touched, self._end)

    def _map(self, size: int, asked: int) -> int:
        address, self._next_mapped = self._next_mapped, self._next_mapped - 1
        mapped = -(-asked // _PAGE) * _PAGE
        self._mapped[address] = mapped, size
        self._mapped_bytes += mapped
        self.peak = max(self.peak, self.resident)
        return address

    def _add(self, start: int, size: int) -> None:
        before = self._hole_ends.get(start)
        if before is not None:
            size += self._remove(before)
            start = before
        if start + size in self._holes:
            size += self._remove(start + size)
        if start + size == self._top:
            self._top = start
            return
        self._holes[start] = size
        self._hole_ends[start + size] = start
        insort(self._by_size, (size, start))

    def _remove(self, start: int) -> int:
        size = self._holes.pop(start)
        del self._hole_ends[start + size]
        self._by_size.pop(bisect_left(self._by_size, (size, start)))
        return size
