"""What both kinds of lanes have. A lane is one of the parallel ways in one direction to or from one neighbour.

Callers and the records of the proxy meet in lanes and nowhere else. A lane's lock is held for moments only: never while bytes are
copied, while anybody waits, nor around a call into the event pump that may wait for somebody else.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.direct import DirectPath
from adaptra_plugin.transport.memory import MIB, Memory
from adaptra_plugin.transport.shared import BackpressureDrainer, Counters, Loss, Shared
from adaptra_plugin.transport.types import Direction, PeerInfo

DRAIN_FROM = 64 << 10
"""Before a message of so many bytes is staged, the books are brought up to date, which costs a system call: an empty ring
is filled from its start again, where it is in the caches."""


class Lane(ABC):
    def __init__(self, peer: PeerInfo, direction: Direction, index: int, memory: Memory, shared: Shared) -> None:
        self.peer = peer
        self.direction = direction
        self.index = index
        self.memory = memory
        self.config = shared.config
        self.fate = shared.fate
        self.pump = shared.pump
        self.slabs = shared.slabs
        self.copier = shared.copier
        self.clock = shared.clock
        self.deadline_s = self.config.deadline_s
        self.capacity = memory.memfd.capacity
        self.limit = min(self.capacity, self.config.max_message_mib * MIB)
        self.counters = Counters()
        self.loss: Loss | None = None
        self.direct: DirectPath | None = None
        """How the peer is told, while that can be without the proxies."""
        self.drainer = BackpressureDrainer()
        self._lock = threading.Lock()

    def _post(self, op: Op, position: int = 0, total: int = 0, value: float = 0.0, after: int = 0) -> None:
        self.pump.post(op, self.peer.rank, self.direction, self.index, position, total, value, after)

    @abstractmethod
    def situation(self) -> str:
        """What waits in the lane, in words for an error."""

    @abstractmethod
    def abort(self, loss: Loss) -> None:
        """Fails what waits; `EventPump.wake` has to follow."""

    def close(self) -> None:
        self.memory.close()

    def stats(self) -> dict[str, Any]:
        """Counters as plain numbers."""
        c = self.counters
        return {
            "messages": c.messages,
            "bytes": c.bytes,
            "blocked_ms": c.blocked_ms,
            "full": c.full,
            "drained_early": c.drained_early,
        }
