"""The sender's book of what lies where in a staging ring.

Only the sender decides on positions. They only grow, by multiples of 64; the receiver's proxy keeps a message at the
same position of the receive ring, which has the same capacity, so what has room here has room there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from adaptra_plugin.transport.memory import MIB
from adaptra_plugin.transport.works import SendWork

WINDOW_BYTES = 64 * MIB
"""What a ring that grows uses to begin with."""
MESSAGES = 4
"""So many of the longest message have room in a ring that grows."""
REUSE = 256
"""A ring that grows and is empty goes on to be filled up to this part of its capacity: 4 MiB of 1 GiB."""


@dataclass(slots=True, eq=False)
class RingEntry:
    """A message, or a part of one, in the sender's ring. Its room is free once the peer has copied it out."""

    position: int
    total: int
    work: SendWork
    consumed: bool = False
    told: bool = False
    """The peer has been told of it, directly."""


class RingAllocator:
    """What lies in a ring of `capacity` bytes, oldest first. The lane's lock guards it.

    `grows`: the ring is as large as it may ever become, and only a *window* at its start is used: no page behind it is ever
    touched. The window grows with the messages (`expect`). Positions are those of the whole ring, so the other end, which
    has the same positions, needs to know nothing of it; a message that would reach over the end of the window begins at the start again.
    """

    def __init__(self, capacity: int, *, grows: bool = False) -> None:
        self.capacity = capacity
        self.window = min(WINDOW_BYTES, capacity) if grows else capacity
        self._grows = grows
        self._next = 0
        self._held: deque[RingEntry] = deque()
        self._by_position: dict[int, RingEntry] = {}

    def __len__(self) -> int:
        return len(self._by_position)

    @property
    def used(self) -> int:
        """Bytes of all messages from the oldest one that is not consumed to the newest one; those between may be consumed."""
        return sum(outgoing.total for outgoing in self._held)

    def expect(self, total: int) -> bool:
        """A message of so many bytes is to come. True if the window has grown for it."""
        wanted = min(self.capacity, -(-MESSAGES * total // MIB) * MIB)
        if not self._grows or wanted <= self.window:
            return False
        self.window = wanted
        return True

    def fits(self, total: int) -> bool:
        """Whether there is room for a message of `total` bytes now."""
        return not self._held or self.place(total) + total - self._held[0].position <= self.capacity

    def place(self, total: int) -> int:
        """The position of the next message, of `total` bytes. An empty ring is filled from its start again: one that never
        holds much touches little memory, and touches the same, cached, pages again."""
        at = self._next % self.capacity
        if self._grows:
            # not after every small message, or the 63 bits of positions could come to an end
            onward = at + total <= self.window and (self._held or at < self.capacity // REUSE)
        else:
            onward = bool(self._held)
        return self._next if onward or not at else self._next - at + self.capacity

    def add(self, outgoing: RingEntry) -> None:
        """A message has been placed; it did fit."""
        self._next = outgoing.position + outgoing.total
        self._held.append(outgoing)
        self._by_position[outgoing.position] = outgoing

    def find(self, position: int) -> RingEntry | None:
        return self._by_position.get(position)

    def consume(self, position: int) -> RingEntry | None:
        """The peer has copied a message out. Room becomes free from the oldest message on."""
        outgoing = self._by_position.get(position)
        if outgoing is not None:
            outgoing.consumed = True
            while self._held and self._held[0].consumed:
                self._held.popleft()
            del self._by_position[position]  # last: a reader that is interrupted begins again with this record
        return outgoing

    def waiting(self) -> list[RingEntry]:
        return list(self._by_position.values())
