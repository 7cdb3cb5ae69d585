"""Room of the receive rings that is free again: told a little later, many messages together, and with what goes anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adaptra_plugin.transport.memfd import most_untold
from adaptra_plugin.transport.proxy.outbox import Item
from adaptra_plugin.transport.proxy.wire import MAX_NOTE_BYTES, POSITIONS, FrameKind
from adaptra_plugin.transport.types import Direction

FREE_S = 0.002
"""Longest time for which it is kept back."""
_TOGETHER = MAX_NOTE_BYTES // POSITIONS.size


class FreeRoom:
    """What has been copied out here, and the peer does not know of yet. `capacities`: of the rings (bytes)."""

    def __init__(self, capacities: Iterable[int]) -> None:
        self.by = math.inf
        """When it has to be told (s)."""
        self._entries: list[tuple[Direction, int, int]] = []
        self._bytes = 0
        self._most = min(map(most_untold, capacities), default=0)

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def much(self) -> bool:
        return self._bytes >= self._most

    def add(self, direction: Direction, lane: int, message: int, nbytes: int, now: float) -> None:
        if not self._entries:
            self.by = now + FREE_S
        self._entries.append((direction, lane, message))
        self._bytes += nbytes

    def take(self) -> list[Item]:
        """The frames that tell of it."""
        entries, self._entries = self._entries, []
        self._bytes, self.by = 0, math.inf
        items = []
        for start in range(0, len(entries), _TOGETHER):
            (direction, lane, message), *more = entries[start : start + _TOGETHER]
            body = b"".join(POSITIONS.pack(*entry) for entry in more)
            items.append(Item(FrameKind.CONSUMED, len(body), None, 0, body, message, 0, direction, lane))
        return items
