"""What one RDMA rail has of a card: slots to send from and to receive into, the landing, and the queue pair behind them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.slots import IMMEDIATES
from adaptra_plugin.transport.proxy.rails.rdma.verbs import Completion, Region, VerbsError, Work
from adaptra_plugin.transport.types import Direction

SLOT_BYTES = 4096
GATHER = 3
"""Pieces of a segment: its header, and its body in two, where its ring or an extent of it ends."""
RECEIVE = 1 << 32
"""Bit of the request numbers of receives."""
Pieces = tuple[tuple[Region, int, int], ...]
"""(region, offset, bytes) of each."""


class QueueMemory:
    """All receives are posted from the start.

    Args:
        rings: what this rank fills: registered with the card.
        slots: receives that are posted, and sends that may be under way.
        landing_bytes: for bodies that come.
    """

    def __init__(self, nic: Nic, rings: Mapping[tuple[Direction, int], Memfd], slots: int, landing_bytes: int) -> None:
        """Raises VerbsError."""
        self.slots = slots
        self.connected = False
        self._nic = nic
        self._parts: list[Any] = []
        device = nic.device
        if not nic.up():
            raise VerbsError(f"{nic.name}: its port is down")
        try:
            for memfd in rings.values():
                nic.ring(memfd)
            self._sends = self._memory(slots * SLOT_BYTES)
            self._send_region = self._owned(device.register(self._sends))
            self._receives = self._memory(slots * SLOT_BYTES)
            self._receive_region = self._owned(device.register(self._receives))
            self.landing = self._memory(landing_bytes)
            self.landing_region = self._owned(device.register(self.landing, remote_write=True))
            # one request a segment, or as many as it has pieces where the device gathers none
            self._gather = min(GATHER, device.max_gather)
            self.completions = self._owned(device.completions((GATHER + 2) * slots))
            wanted = (GATHER * slots, slots, nic.port.number, self._gather)
            self.pair = self._owned(device.queue_pair(self.completions, *wanted))
            for index in range(slots):
                self.post_receive(index)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _memory(nbytes: int) -> memoryview:
        area = mmap.mmap(-1, nbytes)
        area.madvise(mmap.MADV_DONTFORK)  # the device writes to these pages, not to a copy that a fork makes
        return memoryview(area)

    def _owned(self, part: Any) -> Any:
        self._parts.append(part)
        return part

    def post_receive(self, index: int) -> None:
        """A slot is free for what comes. Raises VerbsError."""
        self.pair.post_receive(RECEIVE | index, self._receive_region, index * SLOT_BYTES, SLOT_BYTES)

    def received(self, completion: Completion) -> tuple[int, memoryview]:
        """(index of the slot that was used up, what lies in it)."""
        index = completion.request & (RECEIVE - 1)
        return index, self._receives[index * SLOT_BYTES : index * SLOT_BYTES + completion.nbytes]

    def post(self, slot: int, prefix: bytes, payload: bytes | memoryview) -> None:
        """Sends a slot. Raises VerbsError."""
        self.pair.post([Work(slot, *self._fill(slot, prefix, payload))])

    def write(
        self, slot: int, prefix: bytes, payload: bytes | memoryview, body: Pieces, at: int, target: tuple[int, int, int]
    ) -> None:
        """Writes a slot, with a body behind it, into the other end's landing, at the position `at`. Raises VerbsError.

        Args:
            target: address, key and size of that landing.
        """
        address, key, landing_bytes = target
        address += at % landing_bytes
        parts = (self._fill(slot, prefix, payload), *body)
        works = []
        # as few requests as the device can make of these pieces; the last one tells, of both ends, that all is done
        for index in range(0, len(parts), self._gather):
            first, *more = parts[index : index + self._gather]
            last = index + self._gather >= len(parts)
            immediate = at % IMMEDIATES if last else None
            works.append(Work(slot, *first, (address, key), immediate, signaled=last, more=tuple(more)))
            address += first[2] + _length(more)
        self.pair.post(works)

    def _fill(self, slot: int, prefix: bytes, payload: bytes | memoryview) -> tuple[Region, int, int]:
        start, middle = slot * SLOT_BYTES, slot * SLOT_BYTES + len(prefix)
        self._sends[start:middle] = prefix
        self._sends[middle : middle + len(payload)] = payload
        return self._send_region, start, len(prefix) + len(payload)

    def close(self) -> None:
        """Back to the card, which may keep the pair for a while. Idempotent."""
        parts, self._parts = self._parts, []
        self._nic.retire(self.pair if self.connected else None, parts[::-1])


def _length(pieces: Sequence[tuple[Region, int, int]]) -> int:
    return sum(nbytes for _, _, nbytes in pieces)
