"""What has come: segments of messages that fill the receive ring, at the positions of the peer's ring. Pure, but for the bytes."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.wire import UNIT, FrameHeader, MalformedFrame


@dataclass(slots=True)
class Incoming:
    """A message of which at least a segment is known."""

    message: int
    total: int
    sent: float
    after: int | None
    """Position of a message of the same key that has to be delivered before this one."""
    segments: set[int] = field(default_factory=set)
    missing: int = 0
    by_reference: bool = False
    delivered: bool = False


class LaneInbox:
    """One lane of one direction.

    Args:
        receive_ring: memory of the same size as the peer's ring.
        limit: longest message (bytes).
    """

    def __init__(self, receive_ring: Memfd, limit: int) -> None:
        self.receive_ring = receive_ring
        self.limit = limit
        self.messages: dict[int, Incoming] = {}
        self.gone: set[int] = set()  # released, and the sender may not know yet
        self._gone_first: list[int] = []  # the same as a heap
        self._followers: dict[int, list[int]] = {}  # by the message that has to be delivered before
        self.floor = 0
        self.duplicates = 0

    def _message(self, header: FrameHeader) -> Incoming | None:
        """The message that a segment belongs to; None: it is done with."""
        if header.floor > self.floor:
            self.floor = header.floor
            while self._gone_first and self._gone_first[0] < self.floor:
                self.gone.remove(heapq.heappop(self._gone_first))
        if header.message < self.floor or header.message in self.gone:
            return None
        found = self.messages.get(header.message)
        if found is None:
            self._check(header)
            after = header.message - header.after * UNIT if header.after else None
            found = Incoming(header.message, header.total, header.sent, after, missing=header.total)
            self.messages[header.message] = found
            if after is not None and self._waits(found):
                self._followers.setdefault(after, []).append(found.message)
        elif found.total != header.total:
            raise MalformedFrame(
                f"a segment says its message at {header.message} has {header.total} bytes, another said {found.total}"
            )
        return found

    def _check(self, header: FrameHeader) -> None:
        """A new message. One that its sender's ring cannot hold, or ever so many, would fill this process."""
        if header.total > self.limit:
            raise MalformedFrame(f"a message of {header.total} bytes is announced; at most {self.limit} fit here")
        if header.message + header.total > header.floor + self.receive_ring.capacity:
            raise MalformedFrame(
                f"a message of {header.total} bytes at {header.message} is announced, and a ring of "
                f"{self.receive_ring.capacity} that begins at {header.floor} cannot hold it"
            )
        if len(self.messages) >= self.receive_ring.capacity // UNIT:
            raise MalformedFrame(f"{len(self.messages)} messages have been begun, more than the ring has room for")

    def has(self, header: FrameHeader) -> bool:
        """Whether the bytes of a segment have come, or the message is done with."""
        found = self._message(header)
        return found is None or not found.missing or header.at in found.segments

    def place(self, header: FrameHeader) -> list[memoryview] | None:
        """Where the bytes of a segment go; None if they have come before."""
        if self.has(header):
            self.duplicates += 1
            return None
        return self.receive_ring.slices(header.message + header.at, header.length)

    def filled(self, header: FrameHeader) -> list[Incoming]:
        """A segment that was placed is complete. The messages that can be delivered by that."""
        found = self.messages[header.message]
        found.segments.add(header.at)
        found.missing = max(0, found.missing - header.length)
        return [] if found.missing else self._deliverable(found)

    def referenced(self, header: FrameHeader) -> list[Incoming]:
        """The whole of a message lies in the peer's ring, whatever of it has come. The messages that can be delivered."""
        found = self._message(header)
        if found is None or not found.missing:
            self.duplicates += 1
            return []
        found.by_reference, found.missing = True, 0
        return self._deliverable(found)

    def _deliverable(self, first: Incoming) -> list[Incoming]:
        ready: list[Incoming] = []
        candidates = [first.message]
        while candidates:
            # the oldest one first: a newer one of its key may name the same message, or one before
            found = self.messages[heapq.heappop(candidates)]
            if found.missing or found.delivered or self._waits(found):
                continue
            found.delivered = True
            ready.append(found)
            for message in self._followers.pop(found.message, ()):
                heapq.heappush(candidates, message)
        return ready

    def _waits(self, found: Incoming) -> bool:
        if found.after is None or found.after < self.floor or found.after in self.gone:
            return False
        before = self.messages.get(found.after)
        return before is None or not before.delivered

    def release(self, message: int) -> int:
        """The endpoint has copied a delivered message out. How much room is free by that (bytes)."""
        found = self.messages.get(message)
        if found is None or not found.delivered:
            return 0
        del self.messages[message]
        self.gone.add(message)
        heapq.heappush(self._gone_first, message)
        return found.total
