"""Memory for large messages that are received again and again, in the same few sizes.

Fresh memory costs a page fault every 4 KiB, which on a virtual machine takes longer than copying the bytes. A slab goes
back to its owner when the last tensor on it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections import deque

import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import told

SLAB_FROM = 1 << 20
"""Tensors from this size on (bytes) are worth a slab."""
_SIZES = 8
_ROUND = 64 << 10


class Slabs:
    """Keeps at most `limit` bytes of free slabs of each of the few newest sizes. Used from any thread.

    What goes back does so from a finalizer, which may run anywhere: hence no lock, only single operations on deques.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, deque[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in host memory; its storage cannot be resized."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // _ROUND) * _ROUND
        free = self._free.get(size)
        if free is None:
            while len(self._free) >= _SIZES:
                self._free.pop(next(iter(self._free)), None)
            free = self._free[size] = deque(maxlen=max(1, self._limit // size))
        try:
            area = free.popleft()
        except IndexError:
            with told(f"no memory for a received tensor of {nbytes} bytes", TransportError):
                area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel built without them
                    area.madvise(mmap.MADV_HUGEPAGE)
        window = (ctypes.c_char * size).from_buffer(area)
        weakref.finalize(window, free.append, area).atexit = False
        storage = torch.frombuffer(window, dtype=torch.uint8).untyped_storage()
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        tensor.set_(storage, 0, shape)  # type: ignore[call-overload]
        return tensor
