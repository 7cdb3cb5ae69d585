"""The staging ring: a bounded piece of memory that one side fills and the other empties, first in, first out.

Positions are plain offsets and two counters that only grow, one written by each side, so the memory and the counters
may later live in shared memory, with the proxy in a process of its own.
"""

from __future__ import annotations

import mmap

import torch


class Ring:
    """`capacity` bytes, mapped at first use and touched page by page.

    The producer calls `free`, `place` and `commit`, the consumer `release`; both may look at the bytes between.
    Whenever the ring is empty, filling starts again at offset 0: a ring that never holds much touches little memory,
    and touches the same, cached, pages again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._produced = 0  # written by the producer only
        self._consumed = 0  # written by the consumer only
        self._write = 0
        self._view: memoryview | None = None
        self._tensor: torch.Tensor | None = None

    @property
    def used(self) -> int:
        return self._produced - self._consumed

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def place(self) -> int:
        """The offset at which the next bytes go."""
        if self._produced == self._consumed:
            self._write = 0
        return self._write

    def commit(self, nbytes: int) -> None:
        """The producer has filled `nbytes` (at most `free`) from `place()` on."""
        self._write = (self._write + nbytes) % self.capacity
        self._produced += nbytes

    def release(self, nbytes: int) -> None:
        """The consumer has done with the oldest `nbytes`."""
        self._consumed += nbytes

    @property
    def view(self) -> memoryview:
        if self._view is None:
            # private: a forked child gets its own copy, never a window into the parent's traffic
            area = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._tensor = torch.frombuffer(area, dtype=torch.uint8)
            self._view = memoryview(area)
        return self._view

    @property
    def tensor(self) -> torch.Tensor:
        _ = self.view
        return self._tensor

    def window(self) -> memoryview:
        """The free bytes from `place()` up to the end of the memory; empty when the ring is full."""
        start = self.place()
        return self.view[start : start + min(self.free, self.capacity - start)]

    def _pieces(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        offset %= self.capacity
        first = min(nbytes, self.capacity - offset)
        return [(offset, offset + first)] if first == nbytes else [(offset, self.capacity), (0, nbytes - first)]

    def slices(self, offset: int, nbytes: int) -> list[memoryview]:
        """The bytes at `offset` (taken modulo the capacity), in one piece or, around the end, two."""
        view = self.view
        return [view[start:stop] for start, stop in self._pieces(offset, nbytes)]

    def read(self, offset: int, nbytes: int) -> bytes:
        return b"".join(self.slices(offset, nbytes))

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        for piece in self.slices(offset, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def copy_in(self, offset: int, data: torch.Tensor) -> None:
        """Copies a flat uint8 tensor into the ring; torch lets other threads run meanwhile."""
        done = 0
        for start, stop in self._pieces(offset, data.numel()):
            self.tensor[start:stop].copy_(data[done : done + stop - start])
            done += stop - start

    def copy_out(self, offset: int, data: torch.Tensor) -> None:
        """Copies from the ring into a flat uint8 tensor; torch lets other threads run meanwhile."""
        done = 0
        for start, stop in self._pieces(offset, data.numel()):
            data[done : done + stop - start].copy_(self.tensor[start:stop])
            done += stop - start
