"""Memory without a name that two processes share: what staging rings live in.

A memory file (`memfd`) has no path, so nothing is left behind by a process that is killed, and it is sealed against
shrinking, so that nobody who has its descriptor can make a reader of it fault.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from collections.abc import Iterator

from adaptra_plugin.transport.types import RING_UNIT

EXTENT_BYTES = 16 << 20


def extent_of(segment_bytes: int, *, grows: bool) -> int | None:
    """For a ring: what grows is taken in parts, none shorter than a segment, so that a segment lies in two at most."""
    return max(EXTENT_BYTES, segment_bytes) if grows else None


ADDRESS_SHARE = 64
"""A ring takes at most such a part of the addresses that a process may have: with two neighbours it has a dozen or more."""


def growth_limit(wanted: int) -> int:
    """How long a ring may be that takes its memory as it grows: no memory file may be longer than RLIMIT_FSIZE, used or not, and
    all that are mapped count for RLIMIT_AS."""
    for limit, share in ((resource.RLIMIT_FSIZE, 1), (resource.RLIMIT_AS, ADDRESS_SHARE)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            wanted = max(RING_UNIT, min(wanted, soft // share // RING_UNIT * RING_UNIT))
    return wanted


_UNTOLD_BYTES, _UNTOLD_SHARE = 256 << 10, 8


def most_untold(capacity: int) -> int:
    """So much room (bytes) of a ring may be free without its sender knowing: news of it waits for company."""
    return min(_UNTOLD_BYTES, capacity // _UNTOLD_SHARE)


class Memfd:
    """`capacity` bytes of shared memory, mapped at first use and touched page by page.

    Positions only grow: position `p` lies at offset `p % capacity`, and a piece that runs over the end continues at 0.
    What needs its pages at once (pinning, registering with a card) takes *extents*, of `extent` bytes, as they come to be used.
    """

    def __init__(self, fd: int, capacity: int, extent: int | None = None) -> None:
        """Takes over the descriptor. `extent`: None: all in one. Raises ValueError if the memory behind it is smaller than
        `capacity`."""
        size = os.fstat(fd).st_size
        if size < capacity:
            os.close(fd)
            raise ValueError(f"a shared memory file has {size} bytes, {capacity} were announced")
        self.fd = fd
        self.capacity = capacity
        self.extent = capacity if extent is None else extent
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    @classmethod
    def create(cls, capacity: int, extent: int | None = None) -> Memfd:
        """Raises OSError when the system has no memory file to give."""
        fd = os.memfd_create("adaptra-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, capacity)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, capacity, extent)

    def same_as(self, other: Memfd) -> bool:
        """Whether both are the same memory."""
        mine, theirs = os.fstat(self.fd), os.fstat(other.fd)
        return (mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino)

    @property
    def view(self) -> memoryview:
        """All bytes. Raises ValueError once the memory file is closed."""
        if self._view is None:
            if self.fd < 0:
                raise ValueError("a shared memory file is used after it was closed")
            self._map = mmap.mmap(self.fd, self.capacity)
            # a forked child must not keep a window into its parent's traffic, nor pay for its pages
            self._map.madvise(mmap.MADV_DONTFORK)
            self._view = memoryview(self._map)
        return self._view

    def pieces(self, position: int, nbytes: int) -> list[tuple[int, int]]:
        """(start, stop) offsets of the bytes at `position`: one piece or, around the end, two; none for no bytes."""
        start = position % self.capacity
        stop = start + nbytes
        if stop <= self.capacity:
            return [(start, stop)] if nbytes else []
        return [(start, self.capacity), (0, stop - self.capacity)]

    def extents(self, position: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """(number of the extent, start, stop) of the bytes at `position`; offsets count from the start of the extent."""
        for start, stop in self.pieces(position, nbytes):
            while start < stop:
                number, at = divmod(start, self.extent)
                end = min(stop - number * self.extent, self.extent)
                yield number, at, end
                start += end - at

    def extent_view(self, number: int) -> memoryview:
        """The bytes of an extent."""
        return self.view[number * self.extent : (number + 1) * self.extent]

    def slices(self, position: int, nbytes: int) -> list[memoryview]:
        view = self.view
        return [view[start:stop] for start, stop in self.pieces(position, nbytes)]

    def read(self, position: int, nbytes: int) -> bytes:
        view = self.view
        return b"".join([view[start:stop] for start, stop in self.pieces(position, nbytes)])

    def write(self, position: int, data: bytes | memoryview) -> None:
        done = 0
        for piece in self.slices(position, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def close(self) -> None:
        """Closes the descriptor. The mapping goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._view = self._map = None
