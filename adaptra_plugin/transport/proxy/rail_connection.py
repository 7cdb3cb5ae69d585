"""A rail as the link sees it: what is under way on it, how fast it is, what has come over it.

Both ends number the frames that have to arrive. A rail loses none and keeps their order until it fails, so one number says
what has come; it travels in the header of whatever goes the other way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from adaptra_plugin.transport.proxy.control import checksum_of
from adaptra_plugin.transport.proxy.outbox import SMALL, Item
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail
from adaptra_plugin.transport.proxy.wire import Flag, FrameHeader, FrameKind, MalformedFrame

FIRST_SPEED = 1e9
"""Assumed speed of a rail that nothing is known of (bytes/s)."""
MIN_WINDOW = 2 << 20
MAX_WINDOW = 64 << 20
TURNS_S = 0.004
"""A proxy does something else for so long (s) before it sees what a fast rail has brought, and the other one likewise."""
ACK_SEGMENT_S, ACK_STATE_S = 0.002, 0.02
"""An acknowledgement of small segments, and of frames of state, waits for so long for something that goes its way."""
MIN_PATIENCE_S = 0.25
"""An acknowledgement is never overdue earlier than this: a proxy may have to wait for a CPU."""
BEST_TRIP_S = 10.0
"""The shortest round trip counts for so long: a queue of our own must not pass for a long way."""
_ENOUGH = 1 << 16  # bytes that say something about speed
_QUEUED = 1.5  # a round trip so much longer than the shortest shows that frames wait: the rail is busy


@dataclass(slots=True)
class Sent:
    """A numbered frame under way. `fresh`: nothing had been answered since the rail was idle."""

    number: int
    item: Item
    at: float
    nbytes: int
    delivered: int
    delivered_at: float
    fresh: bool
    reference: bool


@dataclass(slots=True, eq=False)
class RailConnection:
    """One connection of a rail."""

    rail: Rail
    ready: bool = True
    """Data may go over it (a rail by reference has to wait for the peer's mapping)."""
    ours: int = 0
    """Which connection of this end it is, counted over all rails; the peer learns it from pings."""
    theirs: int = 0
    """The same of the other end; 0: not known yet."""
    sequence: int = 0
    """Number of the newest frame sent."""
    acked: int = 0
    """All up to this number have arrived."""
    under_way: deque[Sent] = field(default_factory=deque)
    """What is waited for, in order; what goes another way meanwhile is not."""
    moved: tuple[int, float] | None = None
    """Number and time of the oldest frame that goes another way: its answer shows how slow the rail has become."""
    inflight: int = 0
    """Its bytes."""
    speed: float = FIRST_SPEED
    measured: bool = False
    round_trip: float = 0.0
    spread: float = 0.0
    """Mean deviation of the round trip (s)."""
    trips: tuple[float, float, float] = (math.inf, math.inf, 0.0)
    """Shortest round trip of this period, of the one before, and when this one ends."""
    refusals: int = 0
    """Frames that have come damaged since one with a segment has come whole."""
    delivered: int = 0
    delivered_at: float = 0.0
    """When the newest acknowledgement came, or, after a time without anything under way, the first frame left."""
    fresh: bool = True
    patience_factor: float = 1.0
    pinged: float | None = None
    """When the oldest unanswered ping left."""
    asked: float = float("-inf")
    """When the newest ping left."""
    silent_since: float | None = None
    """When the oldest frame left that was overdue; None: something has been answered after that."""
    answered_at: float = float("-inf")
    came: int = 0
    """All frames up to this number have come."""
    told: int = 0
    """The newest number that was acknowledged."""
    ack_by: float = math.inf
    """When that of what has come has to leave (s)."""
    owed: int = 0
    """Bytes of segments that it is about."""
    placed: FrameHeader | None = None
    """The segment that the rail is in the middle of."""

    # --- sending

    def submit(self, item: Item, header: FrameHeader, body: Sequence[memoryview | bytes], now: float) -> None:
        """A frame that has to arrive. One with a reference leaves its bytes where they are."""
        if not self.under_way:
            self.delivered_at, self.fresh = now, True
        self.sequence = header.sequence = self.sequence + 1
        reference = bool(header.flags & Flag.REFERENCE)
        nbytes = 0 if reference else item.length
        self.under_way.append(
            Sent(self.sequence, item, now, nbytes, self.delivered, self.delivered_at, self.fresh, reference)
        )
        self.inflight += nbytes
        self._tell(header, body)

    def tell(self, header: FrameHeader, body: bytes = b"") -> None:
        """A frame of which nobody needs to know whether it has arrived."""
        self._tell(header, seal(header, body))

    def _tell(self, header: FrameHeader, body: Sequence[memoryview | bytes]) -> None:
        header.ack = self.told = self.came
        self.ack_by, self.owed = math.inf, 0
        self.rail.submit(Frame(header, body))

    @property
    def best_trip(self) -> float:
        """Round trip without a queue (s)."""
        best = min(self.trips[:2])
        return best if best < math.inf else self.round_trip

    @property
    def window(self) -> int:
        """Bytes that may be under way: twice what the rail delivers in a round trip, or in the turns of the two proxies,
        which take longer on a fast rail; as far as that is known."""
        wanted = self.speed * max(2 * self.best_trip, TURNS_S)
        if not self.measured:
            wanted = min(wanted, 2 * self.delivered)
        return int(min(MAX_WINDOW, max(MIN_WINDOW, wanted)))

    def finish_s(self, nbytes: int) -> float:
        """When `nbytes` more would have arrived (s from now)."""
        return (self.inflight + nbytes) / self.speed + self.best_trip / 2

    def acknowledged(self, number: int, now: float) -> list[Sent]:
        """All frames up to `number` have arrived: those that were still waited for. Raises MalformedFrame."""
        if number > self.sequence:
            raise MalformedFrame(f"frame {number} of a rail is acknowledged, {self.sequence} were sent")
        self.acked = number
        self.silent_since, self.answered_at = None, now
        under_way, arrived, nbytes = self.under_way, [], 0
        while under_way and under_way[0].number <= number:
            sent = under_way.popleft()
            arrived.append(sent)
            nbytes += sent.nbytes
        self.inflight -= nbytes
        self.delivered += nbytes
        if nbytes:
            self.refusals = 0
        if self.moved is not None and number >= self.moved[0]:
            self._timed(now - self.moved[1], now)
            self.moved = None
        if arrived:
            self._measure(sent, nbytes, now)
            if self.pinged is not None and sent.at >= self.pinged:
                self.pinged = None
        return arrived

    def refused(self, number: int) -> Sent | None:
        """The frame of that number has come damaged. None: it goes another way already."""
        for sent in self.under_way:
            if sent.number == number:
                self.under_way.remove(sent)
                self.inflight -= sent.nbytes
                self.refusals += 1
                return sent
        return None

    def ponged(self, sent: float, now: float) -> None:
        """A ping that left at `sent` is answered; of what the peer says about that only times that can be are used."""
        sent = min(sent, now)
        self.silent_since, self.answered_at, self.patience_factor = None, now, 1.0
        if self.pinged is not None and sent >= self.pinged:
            self.pinged = None
        self._shortest(now - sent, now)

    def _measure(self, sent: Sent, acked: int, now: float) -> None:
        """`acked`: bytes that have been acknowledged together, `sent` as the last of them."""
        self.delivered_at, self.fresh = now, False
        self.patience_factor = 1.0
        trip = now - sent.at
        self._timed(trip, now)
        if acked < _ENOUGH:
            return  # the acknowledgement may have waited for company
        # after an idle time the way there and back counts too, which says nothing about speed
        way = self.best_trip if sent.fresh else 0.0
        elapsed = now - sent.delivered_at - way
        nbytes = self.delivered - sent.delivered
        if elapsed <= way:
            return
        speed = nbytes / elapsed
        if speed < self.speed and trip < _QUEUED * self.best_trip:
            return  # there was too little to carry to see how fast the rail is
        self.speed = self.speed + 0.25 * (speed - self.speed) if self.measured else speed
        self.measured = True

    def _timed(self, trip: float, now: float) -> None:
        if not self.round_trip:
            self.round_trip, self.spread = trip, trip / 2
        else:
            self.spread += 0.25 * (abs(trip - self.round_trip) - self.spread)
            self.round_trip += 0.125 * (trip - self.round_trip)
        self._shortest(trip, now)

    def _shortest(self, trip: float, now: float) -> None:
        best, before, ends = self.trips
        self.trips = (min(best, trip), before, ends) if now < ends else (trip, best, now + BEST_TRIP_S)

    def take_all(self) -> list[Sent]:
        """Everything under way: it has to go again."""
        if (oldest := self.oldest) is not None and self.silent_since is None:
            self.silent_since = oldest
        found = list(self.under_way)
        if found and self.moved is None:
            self.moved = (found[0].number, found[0].at)
        self.under_way.clear()
        self.inflight = 0
        return found

    def overdue(self, now: float) -> bool:
        """Whether the oldest frame, or ping, should have been answered."""
        return (oldest := self.oldest) is not None and now - oldest > self.patience_s

    @property
    def patience_s(self) -> float:
        way = 2 * self.round_trip + 4 * self.spread
        return self.patience_factor * max(MIN_PATIENCE_S, way + 2 * self.inflight / self.speed)

    @property
    def oldest(self) -> float | None:
        """When the oldest frame or ping left that waits for an answer."""
        if not self.under_way:
            return self.pinged
        oldest = self.under_way[0].at
        return oldest if self.pinged is None else min(oldest, self.pinged)

    def silent_s(self, now: float) -> float:
        """How long the rail has owed an answer (s)."""
        times = [at for at in (self.oldest, self.silent_since) if at is not None]
        return now - min(times) if times else 0.0

    # --- receiving

    def take(self, header: FrameHeader, now: float) -> None:
        """A numbered frame has come. Raises MalformedFrame if it is not the next one."""
        self.expect(header)
        self.came = header.sequence
        if header.kind is FrameKind.SEGMENT:
            self.owed += header.body_bytes
            # much of it paces the sender, who knows by it how fast the rail is
            by = now + ACK_SEGMENT_S if self.owed < SMALL else now
        else:
            by = now + ACK_STATE_S
        if by < self.ack_by:
            self.ack_by = by

    def expect(self, header: FrameHeader) -> None:
        """Raises MalformedFrame if a numbered frame is not the next one."""
        if header.sequence != self.came + 1:
            raise MalformedFrame(f"frame {header.sequence} of a rail came where {self.came + 1} was due")


def seal(header: FrameHeader, body: bytes) -> list[memoryview | bytes]:
    """Completes the header of a frame that is no segment. The pieces of its body."""
    if not body:
        return []
    header.length = len(body)
    header.flags |= Flag.VERIFIED
    header.checksum = checksum_of([body])
    return [body]
