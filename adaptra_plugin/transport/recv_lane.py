"""Messages of a neighbour that have arrived, and the receives that they are for."""

from __future__ import annotations

from collections import deque

import torch

from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.frames import HEADER_BYTES, MalformedMessage, MessageHeader, parse_header
from adaptra_plugin.transport.lane import DRAIN_FROM
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.pauses import Pauses
from adaptra_plugin.transport.shared import Loss, Shared
from adaptra_plugin.transport.tensors import Assembly, BadLayout, understand
from adaptra_plugin.transport.types import Direction, Key, PeerInfo
from adaptra_plugin.transport.works import Arrived, RecvWork, Source


class RecvLane(Source):
    """Messages that have arrived, and receives that wait for one. `memory` is the receive ring."""

    def __init__(self, peer: PeerInfo, direction: Direction, index: int, memory: Memory, shared: Shared) -> None:
        super().__init__(peer, direction, index, memory, shared)
        self.pauses: Pauses | None = None
        """Of the link."""
        self.remote: Memory | None = None
        """The peer's own ring, once it is mapped here."""
        self.peer_stuck = False
        """The peer's producer waits for room in this lane."""
        self._posted: dict[Key, deque[RecvWork]] = {}
        self._arrived: dict[Key, deque[Arrived]] = {}
        self._held: dict[int, Arrived] = {}  # by position: what has arrived and has not been copied out
        self._parts: dict[Key, MessageHeader] = {}  # the newest part of messages that are not complete
        self._entering: Arrived | None = None  # what `deliver` is at
        self._entered = -1  # position of the newest one that it is done with
        self._direct_through = -1  # position of the newest one that came directly
        self._ahead: RecvWork | None = None  # is on its way to the device, or there, and nobody has waited for it

    def post(self, key: Key, device: torch.device | None = None) -> RecvWork:
        """A receive; it is matched with what has arrived or will, first come first served per key."""
        if device is not None and device.type == "cpu" and not self.copier.device.serves(device):
            device = None  # it is there already
        work = RecvWork(key, self, self.copier.device.here(device) if device is not None else None)
        with self._lock:
            whole = False
            waiting = self._arrived.get(key)
            while waiting and not whole:
                arrived = waiting.popleft()
                whole = work.arrive(arrived) and arrived.is_last
            if waiting is not None and not waiting:
                del self._arrived[key]
            if not whole and self.loss is not None:
                work.complete(self.loss)
            elif not whole:
                self._posted.setdefault(key, deque()).append(work)
        if self.peer_stuck:
            self.pump.wake()  # a blocked send may drain early now
        if work.for_device:
            with self._lock:
                self._fetch_oldest()
        return work

    def deliver(self, position: int, total: int, *, by_reference: bool, delay_ms: float, came_s: float = 0.0) -> None:
        """The proxy has a whole message. After an exception that has interrupted it, that of a signal handler, it is called
        once more for the same message before any other one, and completes what is left to do. Raises MalformedMessage."""
        if position <= self._direct_through:
            self._known(position, total)
        else:
            self._deliver(position, total, by_reference, delay_ms, came_s, direct=False)

    def deliver_direct(self, position: int, total: int, came_s: float) -> None:
        """The same of a message that lies in the peer's ring, and that no link was in the way of."""
        if position < self._direct_through:
            raise MalformedMessage(f"a message at {position} came after one at {self._direct_through}")
        with self._lock:
            oldest = next(iter(self._held), position)
        if position + total > oldest + self.capacity:
            raise MalformedMessage(
                f"a message of {total} bytes at {position} does not fit into a ring of {self.capacity} with one at {oldest}"
            )
        self._deliver(position, total, True, 0.0, came_s, direct=True)
        self._direct_through = position

    def _known(self, position: int, total: int) -> None:
        """A message that came directly is told of again, because that path has broken since: its sender still has to hear when it is
        copied out."""
        with self._lock:
            held = self._held.get(position)
            if held is not None:
                held.direct = False
                return
        self._post(Op.RELEASE, position, total)

    def _deliver(
        self, position: int, total: int, by_reference: bool, delay_ms: float, came_s: float, *, direct: bool
    ) -> None:
        if position == self._entered:
            return
        if self._entering is None or self._entering.position != position:
            self._entering = arrived = self._understand(position, total, by_reference, delay_ms, came_s, direct)
            self.counters.messages += arrived.is_last
            self.counters.bytes += total
        arrived = self._entering
        with self._lock:
            self._enter(arrived)
            if arrived.is_last:
                self._parts.pop(arrived.header.key, None)
            else:
                self._parts[arrived.header.key] = arrived.header
        self._entered = position
        self._entering = None

    def _understand(
        self, position: int, total: int, by_reference: bool, delay_ms: float, came_s: float, direct: bool
    ) -> Arrived:
        memory = self.remote if by_reference else self.memory
        if memory is None:
            raise MalformedMessage("a message came by reference, and the peer's ring is not mapped")
        if not HEADER_BYTES <= total <= self.limit:
            raise MalformedMessage(f"a message has {total} bytes; at most {self.limit} are accepted here")
        memfd = memory.memfd
        raw = memfd.read(position, HEADER_BYTES)
        header = parse_header(raw, direction=self.direction, total=total, limit=self.limit)
        before = self._parts.get(header.key)
        expected = (before.at + before.payload_bytes, before.whole) if before is not None else (0, header.whole)
        if (header.at, header.whole) != expected:
            raise MalformedMessage(
                f"{header.key}: a part begins at {header.at} of {header.whole} bytes instead of {expected[0]} of {expected[1]}"
            )
        meta = memfd.read(position + HEADER_BYTES, header.meta_bytes)
        try:
            specs = () if header.at else understand(meta, header.tensors, header.whole)
        except BadLayout as error:
            raise MalformedMessage(f"{header.key}: {error}") from None
        payload_at = position + HEADER_BYTES + header.meta_bytes
        return Arrived(position, total, memory, payload_at, specs, header, delay_ms, came_s, direct)

    def _enter(self, arrived: Arrived) -> None:
        """Under the lock. Each step leaves what another run of all of them completes; meanwhile others may have taken the
        message, once a receive is posted for it."""
        key = arrived.header.key
        if self.loss is not None and arrived.at and arrived.work is None and not self._arrived.get(key):
            return  # the work that has its beginning has failed
        posted = self._posted.get(key)
        if arrived.work is not None:
            arrived.work.arrive(arrived)  # does nothing if it did all before
        else:
            self._held[arrived.position] = arrived
            while posted and not posted[0].arrive(arrived):
                posted.popleft()
        work = arrived.work
        if work is None:
            waiting = self._arrived.get(key)
            if not waiting:
                self._arrived[key] = deque((arrived,))
            elif waiting[-1] is not arrived:
                waiting.append(arrived)
        elif arrived.is_last and posted and posted[0] is work:
            posted.popleft()
        if posted is not None and not posted:
            self._posted.pop(key, None)
        if work is not None and work.for_device:
            if work is self._ahead:  # its next part
                self.copier.fetches.put(work.fetch)
            else:
                self._fetch_oldest()

    def _fetch_oldest(self) -> None:
        """Under the lock: has the oldest message that is asked for taken to its device, if none is there ahead of its turn."""
        if self._ahead is not None:
            return
        for position in sorted(self._held):
            work = self._held[position].work
            if work is not None and work.for_device:
                self._ahead = work
                self.copier.fetches.put(work.fetch)
                return

    def fetched(self, work: RecvWork) -> None:
        """Caller: has waited for a message on a device."""
        with self._lock:
            if self._ahead is work:
                self._ahead = None
            self._fetch_oldest()

    def assembly(self, first: Arrived, device: torch.device | None) -> Assembly:
        """Memory for a message of which the first part is given, fit for a copy to `device` if that is given."""
        served = device is not None and self.copier.device.serves(device)
        return Assembly(first.specs, self.slabs, self.copier.device.pinned if served else None)

    def release(self, arrived: Arrived) -> None:
        """Caller: it has been copied out."""
        with self._lock:
            self._held.pop(arrived.position, None)
            direct, known = self.direct, not arrived.direct
        if known:
            self._post(Op.RELEASE, arrived.position, arrived.total)
        elif direct is not None:
            # a long message's room is wanted back while it is in the caches
            urgent = self.peer_stuck or arrived.total >= DRAIN_FROM
            direct.consumed(self.direction, self.index, arrived.position, arrived.total, urgent=urgent)

    def copied(self) -> None:
        """Caller: it has copied a message, and lets others."""
        if self.peer_stuck:
            self.pump.wake()  # a blocked send may have waited for this copy to end

    def _oldest(self) -> RecvWork | None:
        """The work of the message that is to be drained early next, if the peer waits for room. No other than the oldest one:
        the peer's room becomes free from there on, and what has not been asked for stays where it is."""
        if not self.peer_stuck:
            return None
        with self._lock:
            if not self._held:
                return None
            work = self._held[min(self._held)].work
        return work if work is not None and work.idle else None

    def can_drain_early(self) -> bool:
        return self._oldest() is not None

    def drain_early(self) -> bool:
        """Caller: if the peer waits for room, moves the oldest message into the work that waits for it. False if there
        is nothing to do."""
        work = self._oldest()
        if work is None or not work.drain_early():
            return False
        with self._lock:
            self.counters.drained_early += 1
        return True

    def situation(self) -> str:
        with self._lock:
            unread = [str(key) for key in self._arrived][:3]
            used = sum(arrived.total for arrived in self._held.values())
        held = f"; unread: {', '.join(unread)}" if unread else ""
        return (
            f"{self.counters.messages} messages have come on this connection, {used} of {self.capacity} "
            f"bytes of its ring are in use{held}."
        )

    def abort(self, loss: Loss) -> None:
        """Nothing more will come: fails the receives that wait, and later ones for what has not arrived."""
        with self._lock:
            self.loss = self.loss or loss
            for works in self._posted.values():
                for work in works:
                    work.complete(loss)
            self._posted.clear()

    def close(self) -> None:
        super().close()
        if self.remote is not None:
            self.remote.close()
