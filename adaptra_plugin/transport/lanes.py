"""One lane = one direction of one data connection: its staging ring and what waits in it.

Callers and the proxy meet here and nowhere else. The caller's thread copies tensors in and out; the proxy moves bytes
between ring and socket and keeps the books.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.errors import TransferTimeout, TransportError
from adaptra_plugin.transport.frames import HEADER_BYTES, Header, Kind
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.ring import Ring
from adaptra_plugin.transport.tensors import Spec, copy_in, copy_out, describe
from adaptra_plugin.transport.tickets import Fate, Loss, RecvTicket, Ticket
from adaptra_plugin.transport.types import Direction, Key, Message, PeerInfo

MIB = 1 << 20


@dataclass(slots=True)
class Outgoing:
    """A whole frame in the sender's ring. `due`: earliest moment for the wire (endpoint's clock, s)."""

    offset: int
    total: int
    due: float
    ticket: Ticket
    done: int = 0


@dataclass(slots=True)
class Arrived:
    """A whole frame in the receiver's ring, or one of the proxy's own frames that only takes space there."""

    total: int
    offset: int = 0
    meta_bytes: int = 0
    specs: tuple[Spec, ...] = ()
    tag: int = 0
    delay_ms: float = 0.0
    delayed_by_ring: bool = False
    done: bool = False
    ticket: RecvTicket | None = None  # the receive that it belongs to, once that is posted


@dataclass(slots=True)
class Counters:
    messages: int = 0
    bytes: int = 0
    blocked_ms: float = 0.0
    full: int = 0  # how often the ring was full
    absorbed: int = 0  # messages that a blocked send took out of this receive ring


@dataclass
class Lane(ABC):
    peer: PeerInfo
    direction: Direction
    config: TransportConfig
    fate: Fate
    wake: Callable[[], None] = lambda: None  # asks the proxy to look at the lane again
    counters: Counters = field(default_factory=Counters)
    loss: Loss | None = None

    def __post_init__(self) -> None:
        self.ring = Ring(self.config.ring_mib * MIB)
        self.deadline_s = self.config.deadline_s
        self._lock = threading.Lock()

    @abstractmethod
    def situation(self) -> str:
        """What waits in the lane, in words for an error."""

    @abstractmethod
    def abort(self, loss: Loss) -> None: ...


class SendLane(Lane):
    """Frames on their way out, in order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queue: deque[Outgoing] = deque()  # callers append, the proxy pops
        self.limit = min(self.ring.capacity, self.config.max_message_mib * MIB)  # the handshake may lower it
        self.sequence = 0
        self._producer = threading.Lock()  # one caller at a time fills the ring
        self._change = threading.Event()  # something that a blocked producer waits for may have happened
        self._blocked = False
        self._warned = False
        self.relieve: Callable[[], bool] = lambda: False
        """What a blocked producer does, without any lock, to let the peer go on; True: it helped, look again."""

    def send(
        self, key: Key, tensors: Sequence[torch.Tensor], tag: int, clock: Callable[[], float], hold_s: float
    ) -> Ticket:
        """Stages a message. `clock`: the endpoint's (s); `hold_s`: the message leaves no earlier than this after it is
        staged."""
        meta, payload = describe(tensors)
        total = HEADER_BYTES + len(meta) + payload
        if total > self.limit:
            raise TransportError(
                f"{key} has {total} bytes ({total / MIB:.1f} MiB), more than the {self.limit} bytes that one transfer "
                f"to {self.peer} may have: set adaptra.transport.ring_mib to {-(-total // MIB)} or more on every rank "
                f"(now {self.config.ring_mib}; max_message_mib is {self.config.max_message_mib})"
            )
        with self._producer:
            self._make_room(total, key)
            offset = self.ring.place()
            # nothing is committed before the copy has succeeded: an error in it leaves the lane as it was
            copy_in(self.ring, offset + HEADER_BYTES + len(meta), tensors)
            # stamped last: neither the wait for room nor that for the device is the link's doing
            sent = clock()
            header = Header(
                Kind.DATA,
                self.sequence,
                sent,
                len(meta),
                payload,
                key.direction,
                len(tensors),
                key.epoch,
                key.stage,
                key.microbatch,
                tag,
            )
            self.ring.write(offset, header.pack() + meta)
            ticket = Ticket(key, self)
            with self._lock:
                self._check(key, 0.0)
                self.sequence += 1
                self.ring.commit(total)
                self.queue.append(Outgoing(offset, total, sent + hold_s if hold_s else 0.0, ticket))
            self.counters.messages += 1
            self.counters.bytes += total
        self.wake()
        return ticket

    def _make_room(self, total: int, key: Key) -> None:
        self._check(key, 0.0)
        if self.ring.free >= total:
            self._warned = False
            return
        started = time.monotonic()
        warn_after = self.config.warn_full_after_ms / 1e3
        self.counters.full += 1
        self._blocked = True
        try:
            while True:
                self._change.clear()  # before looking, so that no change is missed
                if self.ring.free >= total:
                    return
                waited = time.monotonic() - started
                self._check(key, waited)
                if waited >= self.deadline_s:
                    raise TransferTimeout(
                        f"{key} could not be staged for {self.peer} within {self.deadline_s:g} s: "
                        f"{self.situation()} That rank does not consume, or the link is down: look at its log"
                    )
                if not self._warned and waited >= warn_after:
                    self._warned = True
                    log.warning("blocked: %s waits for room towards %s: %s", key, self.peer, self.situation())
                if not self.relieve():
                    pause = self.deadline_s - waited
                    self._change.wait(pause if self._warned else min(pause, warn_after - waited))
        finally:
            self._blocked = False
            self.counters.blocked_ms += (time.monotonic() - started) * 1e3

    def _check(self, key: Key, waited: float) -> None:
        self.fate.check()
        if self.loss is not None:
            raise self.loss.about(key, "be sent to", self.peer, waited)

    def situation(self) -> str:
        return (
            f"{len(self.queue)} messages wait in the staging ring, {self.ring.used} of {self.ring.capacity} bytes "
            "(adaptra.transport.ring_mib)."
        )

    def sent(self, nbytes: int) -> None:
        """The proxy has handed the oldest `nbytes` of the queue to the socket."""
        while nbytes:
            head = self.queue[0]
            step = min(nbytes, head.total - head.done)
            head.done += step
            nbytes -= step
            self.ring.release(step)
            if head.done == head.total:
                self.queue.popleft()
                with self._lock:
                    head.ticket.settle()
        self.nudge()

    def abort(self, loss: Loss) -> None:
        """Nothing more goes out: fails what waits, and every later send."""
        with self._lock:
            self.loss = self.loss or loss
            for outgoing in list(self.queue):
                outgoing.ticket.settle(loss)
        self.nudge()

    def refuse(self, loss: Loss) -> None:
        """No later send is taken, what waits still goes out."""
        with self._lock:
            self.loss = self.loss or loss
        self.nudge()

    def nudge(self) -> None:
        """A blocked producer looks again: there is room, or a loss, or `relieve` may help now."""
        if self._blocked:
            self._change.set()


class RecvLane(Lane):
    """Frames that have arrived, and receives that wait for one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._posted: dict[Key, deque[RecvTicket]] = {}
        self._arrived: dict[Key, deque[Arrived]] = {}
        self._order: deque[Arrived] = deque()  # all frames in the ring, oldest first
        self.paused = False  # the proxy has stopped reading because the ring is full
        self.on_stuck: Callable[[], None] = lambda: None
        """Called, on any thread, when `absorb` may have become possible."""

    def post(self, key: Key) -> RecvTicket:
        """A receive; it is matched with what has arrived or will, first come first served per key."""
        ticket = RecvTicket(key, self)
        with self._lock:
            waiting = self._arrived.get(key)
            if waiting:
                ticket.arrive(waiting.popleft())
                if not waiting:
                    del self._arrived[key]
            elif self.loss is not None:
                ticket.settle(self.loss)
            else:
                self._posted.setdefault(key, deque()).append(ticket)
        if self.paused:
            self.on_stuck()
        return ticket

    def deliver(self, key: Key, arrived: Arrived) -> None:
        """Proxy: a whole data frame is in the ring."""
        self.counters.messages += 1
        self.counters.bytes += arrived.total
        with self._lock:
            self._order.append(arrived)
            posted = self._posted.get(key)
            if posted:
                ticket = posted.popleft()
                if not posted:
                    del self._posted[key]
                if ticket.arrive(arrived):
                    return
            self._arrived.setdefault(key, deque()).append(arrived)

    def skip(self, total: int) -> None:
        """Proxy: a frame of its own was in the ring and is done with."""
        arrived = Arrived(total)
        with self._lock:
            self._order.append(arrived)
        self._finish(arrived)

    def take(self, arrived: Arrived) -> Message:
        """Caller: copies a message out and gives its place in the ring back."""
        tensors = copy_out(self.ring, arrived.offset + HEADER_BYTES + arrived.meta_bytes, arrived.specs)
        self._finish(arrived)
        return Message(tensors, arrived.tag, arrived.delay_ms, arrived.delayed_by_ring)

    def absorb(self) -> bool:
        """Caller: if the ring is full, so that the peer may be blocked, moves its oldest message into the ticket that
        waits for it. False if there is nothing to do, or the oldest message has not been asked for: no other one would
        make room."""
        with self._lock:
            if not (self.paused and self.ring.free == 0 and self._order):
                return False
            ticket = self._order[0].ticket
        if ticket is None:
            return False
        if ticket.absorb():
            with self._lock:
                self.counters.absorbed += 1
        return True

    def _finish(self, arrived: Arrived) -> None:
        with self._lock:
            arrived.done = True
            while self._order and self._order[0].done:
                self.ring.release(self._order.popleft().total)
        if self.paused:
            self.wake()

    def situation(self) -> str:
        with self._lock:
            unread = [str(key) for key in self._arrived][:3]
        held = f"; unread: {', '.join(unread)}" if unread else ""
        return (
            f"{self.counters.messages} messages have come on this connection, {self.ring.used} of {self.ring.capacity} "
            f"bytes of its ring are in use{held}."
        )

    def abort(self, loss: Loss) -> None:
        """Nothing more will come: fails the receives that wait, and later ones for what has not arrived."""
        with self._lock:
            self.loss = self.loss or loss
            for tickets in self._posted.values():
                for ticket in tickets:
                    ticket.settle(loss)
            self._posted.clear()


def lane_stats(lane: Lane) -> dict[str, Any]:
    """Counters of a lane as plain numbers."""
    c = lane.counters
    return {
        "messages": c.messages,
        "bytes": c.bytes,
        "blocked_ms": c.blocked_ms,
        "full": c.full,
        "absorbed": c.absorbed,
    }
