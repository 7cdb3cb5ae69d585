"""A rail as the link sees it: what is under way on it, how fast it is, what has come over it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from adaptra_plugin.transport.proxy.control import checksum_of
from adaptra_plugin.transport.proxy.outbox import Item
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail
from adaptra_plugin.transport.proxy.wire import RANGE, Flag, FrameHeader, MalformedFrame

FIRST_SPEED = 1e9
"""Assumed speed of a rail that nothing is known of (bytes/s)."""
MIN_WINDOW = 2 << 20
MAX_WINDOW = 64 << 20
TURNS_S = 0.004
"""A proxy does something else for so long (s) before it sees what a fast rail has brought, and the other one likewise."""
MIN_PATIENCE_S = 0.25
"""An acknowledgement is never overdue earlier than this: a proxy may have to wait for a CPU."""
MOST_PATIENCE = 64.0
"""Patience grows up to this factor while nothing answers."""
BEST_TRIP_S = 10.0
"""The shortest round trip counts for so long: a queue of our own must not pass for a long way."""
MAX_HOLES = 1 << 16
"""Gaps in the numbers that have come; more than a window holds is nonsense."""
_RANGES = 32
_ENOUGH = 1 << 16  # bytes that say something about speed
_QUEUED = 1.5  # a round trip so much longer than the shortest shows that frames wait: the rail is busy


@dataclass(slots=True)
class Sent:
    """A numbered frame under way."""

    item: Item
    at: float
    nbytes: int
    delivered: int
    delivered_at: float
    fresh: bool
    """Nothing had been answered since the rail was idle."""
    reference: bool = False
    moved: bool = False
    """It was overdue and goes another way; should it be acknowledged after all, it counts."""


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
    under_way: dict[int, Sent] = field(default_factory=dict)
    live: int = 0
    """Frames under way that have not moved."""
    inflight: int = 0
    """Their bytes."""
    speed: float = FIRST_SPEED
    measured: bool = False
    round_trip: float = 0.0
    spread: float = 0.0
    """Mean deviation of the round trip (s)."""
    trips: tuple[float, float, float] = (math.inf, math.inf, 0.0)
    """Shortest round trip of this period, of the one before, and when this one ends."""
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
    ranges: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    """Numbers that have come or need not come any more: first and last of each run."""
    ack_due: int = 0
    placed: dict[int, FrameHeader] = field(default_factory=dict)
    """Segments that the rail is in the middle of, by number."""

    # --- sending

    def number(self, item: Item, now: float, *, reference: bool = False) -> tuple[int, int]:
        """(the number of a frame that leaves now, how many numbers before it are not acknowledged)."""
        if not self.live:
            self.delivered_at, self.fresh = now, True
        self.sequence += 1
        nbytes = 0 if reference else item.length
        self.under_way[self.sequence] = Sent(
            item, now, nbytes, self.delivered, self.delivered_at, self.fresh, reference
        )
        self.live += 1
        self.inflight += nbytes
        while True:
            first, sent = next(iter(self.under_way.items()))
            if not (sent.moved and sent.item.done):
                return self.sequence, self.sequence - first
            del self.under_way[first]

    def tell(self, header: FrameHeader, body: bytes = b"") -> None:
        """Submits a frame that is no segment."""
        header.length = len(body)
        if body:
            header.flags |= Flag.VERIFIED
            header.checksum = checksum_of([memoryview(body)])
        self.rail.submit(Frame(header, [body] if body else []))

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

    def acknowledged(self, cumulative: int, body: bytes, now: float) -> tuple[list[Sent], list[Sent]]:
        """(what has arrived, what was overtaken and is taken for lost). Raises MalformedFrame."""
        found = [(0, cumulative), *_ranges(body)]
        top = max(last for _, last in found)
        if top > self.sequence:
            raise MalformedFrame(f"frame {top} of a rail is acknowledged, {self.sequence} were sent")
        found.sort()
        firsts = [first for first, _ in found]
        numbers = []
        for number in self.under_way:  # in order
            if number > top:
                break
            if number <= found[bisect.bisect_right(firsts, number) - 1][1]:
                numbers.append(number)
        arrived = [self._forget(number) for number in numbers]
        self.delivered += sum(sent.nbytes for sent in arrived)
        if arrived:
            self._measure(arrived[-1], now)
            self.silent_since, self.answered_at = None, now
            if self.pinged is not None and arrived[-1].at >= self.pinged:
                self.pinged = None
        patience = max(0.02, 0.5 * self.round_trip)
        lost = []
        for number, sent in self.under_way.items():
            if number >= top:
                break
            if not sent.moved and now - sent.at > patience:
                lost.append(sent)
        return arrived, [self._move(sent) for sent in lost]

    def ponged(self, sent: float, now: float) -> None:
        """A ping that left at `sent` is answered; of what the peer says about that only times that can be are used."""
        sent = min(sent, now)
        self.silent_since, self.answered_at, self.patience_factor = None, now, 1.0
        if self.pinged is not None and sent >= self.pinged:
            self.pinged = None
        self._shortest(now - sent, now)

    def _measure(self, sent: Sent, now: float) -> None:
        self.delivered_at, self.fresh = now, False
        self.patience_factor = 1.0
        trip = now - sent.at
        if not self.round_trip:
            self.round_trip, self.spread = trip, trip / 2
        else:
            self.spread += 0.25 * (abs(trip - self.round_trip) - self.spread)
            self.round_trip += 0.125 * (trip - self.round_trip)
        self._shortest(trip, now)
        # after an idle time the way there and back counts too, which says nothing about speed
        way = self.best_trip if sent.fresh else 0.0
        elapsed = now - sent.delivered_at - way
        nbytes = self.delivered - sent.delivered
        if nbytes < _ENOUGH or elapsed <= way:
            return
        speed = nbytes / elapsed
        if speed < self.speed and trip < _QUEUED * self.best_trip:
            return  # there was too little to carry to see how fast the rail is
        self.speed = self.speed + 0.25 * (speed - self.speed) if self.measured else speed
        self.measured = True

    def _shortest(self, trip: float, now: float) -> None:
        best, before, ends = self.trips
        self.trips = (min(best, trip), before, ends) if now < ends else (trip, best, now + BEST_TRIP_S)

    def _forget(self, number: int) -> Sent:
        sent = self.under_way.pop(number)
        if not sent.moved:
            self._move(sent)
        return sent

    def _move(self, sent: Sent) -> Sent:
        sent.moved = True
        self.live -= 1
        self.inflight -= sent.nbytes
        return sent

    def take_all(self, before: float = math.inf) -> list[Sent]:
        """Everything under way that left `before`: it has to go again."""
        if (oldest := self.oldest) is not None and self.silent_since is None:
            self.silent_since = oldest
        return [self._move(sent) for sent in self.under_way.values() if not sent.moved and sent.at < before]

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
        sent = next((sent for sent in self.under_way.values() if not sent.moved), None) if self.live else None
        times = [at for at in (sent.at if sent else None, self.pinged) if at is not None]
        return min(times, default=None)

    def silent_s(self, now: float) -> float:
        """How long the rail has owed an answer (s)."""
        times = [at for at in (self.oldest, self.silent_since) if at is not None]
        return now - min(times) if times else 0.0

    # --- receiving

    def came(self, sequence: int) -> bool:
        """A numbered frame has come; False if it had before, or is not waited for any more. Raises MalformedFrame."""
        self.ack_due += 1
        at = bisect.bisect_right(self.ranges, (sequence, 1 << 64)) - 1
        first, last = self.ranges[at]
        if sequence <= last:
            return False
        after = self.ranges[at + 1] if at + 1 < len(self.ranges) else None
        if after is not None and after[0] == sequence + 1:
            end = after[1]
            del self.ranges[at + 1]
        else:
            end = sequence
        if sequence == last + 1:
            self.ranges[at] = (first, end)
        else:
            self.ranges.insert(at + 1, (sequence, end))
        if len(self.ranges) > MAX_HOLES:
            raise MalformedFrame(f"{len(self.ranges)} gaps are in the frames after number {self.cumulative}")
        return True

    def ack_through(self, sequence: int) -> None:
        """The sender does not wait for numbers up to this one any more: they have come, or went another way."""
        if sequence <= self.cumulative:
            return
        rest = [(first, last) for first, last in self.ranges if last > sequence]
        if rest and rest[0][0] <= sequence + 1:
            sequence = rest.pop(0)[1]
        self.ranges = [(0, sequence), *rest]

    @property
    def cumulative(self) -> int:
        """All numbers up to this one have come."""
        return self.ranges[0][1]

    def acknowledgement(self) -> bytes:
        """Body of an ACK: the newest ranges that came after a missing frame."""
        self.ack_due = 0
        return b"".join(RANGE.pack(*item) for item in self.ranges[1:][-_RANGES:])


def _ranges(body: bytes) -> Iterable[tuple[int, int]]:
    if len(body) % RANGE.size or len(body) > _RANGES * RANGE.size:
        raise MalformedFrame(f"an acknowledgement has a body of {len(body)} bytes")
    for at in range(0, len(body), RANGE.size):
        first, last = RANGE.unpack_from(body, at)
        if not 0 < first <= last:
            raise MalformedFrame(f"an acknowledgement has the range {first} to {last}")
        yield first, last
