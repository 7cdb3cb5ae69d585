"""What is to go: messages of this rank's ring, cut into segments, until the peer has consumed them. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from adaptra_plugin.transport.proxy.wire import UNIT, FrameHeader, FrameKind
from adaptra_plugin.transport.types import Direction

SMALL = 64 << 10
"""Messages up to this size (bytes) go in front of larger ones, and so does the first piece of a larger one."""


@dataclass(slots=True, eq=False)
class Item:
    """Something that has to arrive once: a segment, or a frame with a body of its own."""

    kind: FrameKind
    length: int
    outgoing: Outgoing | None = None
    at: int = 0
    body: bytes = b""
    number: int = 0
    total: int = 0
    direction: Direction = Direction.ACTIVATION
    lane: int = 0
    done: bool = False
    queued: bool = True
    covered: bool = False
    """The whole message is under way by reference."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A message in the ring."""

    direction: Direction
    lane: int
    message: int
    total: int
    sent: float
    after: int
    """Units of `UNIT` bytes in front of it, as in the header; 0: none."""
    items: list[Item] = field(default_factory=list)
    missing: int = 0
    acked: bool = False


class Outbox:
    """All lanes of a link. `small` goes before `large`; what is sent again goes first."""

    def __init__(self, lanes: int, segment_bytes: int) -> None:
        self._segment = segment_bytes
        self.lanes: dict[tuple[Direction, int], dict[int, Outgoing]] = {
            (direction, lane): {} for direction in Direction for lane in range(lanes)
        }
        self.small: deque[Item] = deque()
        self.large: deque[Item] = deque()
        self.waiting_bytes = 0
        self.unacked = 0
        """Messages of which not all has arrived."""

    def add(self, direction: Direction, lane: int, message: int, total: int, sent: float, after: int) -> None:
        """`after`: 1 + position of a message that has to be delivered before, 0: none. One that is known already changes nothing."""
        if message in self.lanes[direction, lane]:
            return
        units = (message - (after - 1)) // UNIT if after else 0
        found = Outgoing(direction, lane, message, total, sent, units)
        self.lanes[direction, lane][message] = found
        self.unacked += 1
        at = 0
        while at < total:
            # a short first piece lets the receiver know of a large message early
            step = min(total - at, SMALL if at == 0 and total > self._segment else self._segment)
            item = Item(FrameKind.SEGMENT, step, found, at, direction=direction, lane=lane)
            found.items.append(item)
            self._put(item, at == 0 and step <= SMALL)
            at += step
        found.missing = len(found.items)

    def _put(self, item: Item, small: bool, *, again: bool = False) -> None:
        item.queued = True
        self.waiting_bytes += item.length
        queue = self.small if small else self.large
        if again:
            queue.appendleft(item)
        else:
            queue.append(item)

    def again(self, item: Item) -> None:
        """A segment that may not have arrived."""
        item.covered = False
        if not item.done and not item.queued:
            self._put(item, item.at == 0 and item.length <= SMALL, again=True)

    def peek(self) -> Item | None:
        """The next segment; those that have become needless meanwhile are dropped."""
        for queue in (self.small, self.large):
            while queue:
                if not (queue[0].done or queue[0].covered):
                    return queue[0]
                self._drop(queue)
        return None

    def pop(self) -> Item:
        """The segment that `peek` has shown."""
        return self._drop(self.small or self.large)

    def _drop(self, queue: deque[Item]) -> Item:
        item = queue.popleft()
        item.queued = False
        self.waiting_bytes -= item.length
        return item

    def header(self, item: Item) -> FrameHeader:
        """Of a segment, without what depends on the rail."""
        found = item.outgoing
        assert found is not None
        message = found.message
        floor = next(iter(self.lanes[found.direction, found.lane]), message)
        return FrameHeader(
            FrameKind.SEGMENT,
            direction=found.direction,
            lane=found.lane,
            message=message,
            total=found.total,
            at=item.at,
            length=item.length,
            floor=min(floor, message),
            sent=found.sent,
            after=found.after,
        )

    def acked(self, item: Item) -> Outgoing | None:
        """A segment has arrived. The message, if that was its last one."""
        found = item.outgoing
        assert found is not None
        if item.done:
            return None
        item.done = True
        found.missing -= 1
        if found.missing or found.acked:
            return None
        found.acked = True
        self.unacked -= 1
        return found

    def whole(self, found: Outgoing) -> Outgoing | None:
        """All of a message has arrived at once, by reference or because it is consumed."""
        for item in found.items:
            item.done = True
        found.missing = 0
        if found.acked:
            return None
        found.acked = True
        self.unacked -= 1
        return found

    def consumed(self, direction: Direction, lane: int, message: int) -> Outgoing | None:
        """The peer has copied a message out; None if it was known."""
        return self.lanes[direction, lane].pop(message, None)
