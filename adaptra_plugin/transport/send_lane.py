"""Messages on their way out to a neighbour: what lies in a staging ring of this rank, and who has been told of it."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence

import torch

from adaptra_plugin.errors import TransferTimeout, TransportError
from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.frames import MessageHeader, split
from adaptra_plugin.transport.lane import DRAIN_FROM, Lane
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memory import MIB, Memory
from adaptra_plugin.transport.ring import RingAllocator, RingEntry
from adaptra_plugin.transport.shared import Loss, Shared
from adaptra_plugin.transport.staging import PART_SEGMENTS, Block, Piece, blocks, stage
from adaptra_plugin.transport.tensors import describe
from adaptra_plugin.transport.types import Direction, Key, PeerInfo
from adaptra_plugin.transport.works import SendWork


class SendLane(Lane):
    """Messages on their way out. They lie in the ring in the order in which they were sent."""

    def __init__(self, peer: PeerInfo, direction: Direction, index: int, memory: Memory, shared: Shared) -> None:
        super().__init__(peer, direction, index, memory, shared)
        self.allocator = RingAllocator(self.capacity, grows=self.config.ring_grows)
        self._newest: dict[Key, RingEntry] = {}  # of each key, the last message, or part, that is not consumed
        self._line: deque[object] = deque()  # producers; the first one may fill the ring
        self._copying = 0  # messages that the copier has not told of yet
        self._stuck = False  # the peer has been told that a producer waits for room
        self._warned = False

    def send(self, key: Key, tensors: Sequence[torch.Tensor], tag: int) -> SendWork:
        """Stages a message; see `Channel.send`."""
        meta, length = describe(tensors)
        payload = blocks(tensors, self.copier.device)
        # what is in host memory already is copied faster than it can be told of
        step = (
            PART_SEGMENTS * self.config.segment_kib << 10 if any(block.later for block in payload) else max(length, 1)
        )
        parts = split(key, tag, len(tensors), len(meta), length, step)
        total = sum(part.total for part in parts)
        if total > self.limit:
            raise self._too_long(key, total)
        self._expect(total)
        starts = [part.pack() + (b"" if part.at else meta) for part in parts]
        turn = object()
        self._line.append(turn)
        try:
            self._check(key, 0.0)
            if total >= DRAIN_FROM and len(self.allocator):
                self.pump.drain()
            if self._line[0] is turn and self._fits(total):
                self._warned = False
            else:
                self._make_room(turn, total, key)
            return self._stage(key, parts, starts, payload, total)
        finally:
            self._line.remove(turn)
            if self._line:
                self.pump.wake()

    def _too_long(self, key: Key, total: int) -> TransportError:
        config = self.config
        name, now = ("ring_max_mib", config.ring_max_mib) if config.ring_grows else ("ring_mib", config.ring_mib)
        return TransportError(
            f"{key} has {total} bytes ({total / MIB:.1f} MiB), more than the {self.limit} bytes that one transfer "
            f"to {self.peer} may have: set adaptra.transport.{name} to {-(-total // MIB)} or more on every rank "
            f"(now {now}; max_message_mib is {config.max_message_mib})"
        )

    def _expect(self, total: int) -> None:
        with self._lock:
            grown = self.allocator.expect(total)
        if grown:
            log.info(
                "staging ring %s %d to %s grows to %d MiB, for messages of %.1f MiB (at most %d MiB: "
                "adaptra.transport.ring_max_mib)",
                *(self.direction.word, self.index, self.peer, self.allocator.window // MIB, total / MIB),
                self.capacity // MIB,
            )

    def _stage(
        self, key: Key, parts: Sequence[MessageHeader], starts: Sequence[bytes], payload: Sequence[Block], total: int
    ) -> SendWork:
        with self._lock:
            position = self.allocator.place(total)
        # nothing is entered before the copy has succeeded: an error in it leaves the lane as it was; what is on a device
        # follows, and an error then ends the endpoint
        event = next((self.copier.device.mark(block.data) for block in payload if block.later), None)
        work = SendWork(key, self)
        placed: list[tuple[RingEntry, list[Piece]]] = []
        for part, start in zip(parts, starts, strict=True):
            later = stage(self.memory, position + len(start), payload, part.at, part.payload_bytes)
            self.memory.memfd.write(position, start)
            placed.append((RingEntry(position, part.total, work), later))
            work.missing.add(position)
            position += part.total
        with self._lock:
            self._check(key, 0.0)
            before = self._newest.get(key)
            for outgoing, _ in placed:
                self.allocator.add(outgoing)
            self._newest[key] = placed[-1][0]
            # others hear of messages in the order of their positions
            behind = self._copying > 0 or any(later for _, later in placed)
            self._copying += behind * len(placed)
        self.counters.messages += 1
        self.counters.bytes += total
        for outgoing, later in placed:
            after = before.position + 1 if before is not None else 0
            before = outgoing
            if behind:
                self.copier.submit(
                    self.memory,
                    later,
                    event,
                    str(key),
                    functools.partial(self._copied, outgoing, after),
                )
            else:
                self._tell(outgoing, after)
        return work

    def _copied(self, outgoing: RingEntry, after: int) -> None:
        """On the copier's thread."""
        self._tell(outgoing, after)
        with self._lock:
            self._copying -= 1
        self.pump.wake()  # the work may be done

    def _tell(self, outgoing: RingEntry, after: int) -> None:
        """A message lies in the ring: the peer hears of it, or the proxy."""
        with self._lock:
            direct = self.direct
            if direct is not None:
                outgoing.told = True
                outgoing.work.arrived(outgoing.position)  # it lies where the peer reads it
            elif after and self.allocator.find(after - 1) is None:
                after = 0  # consumed since, maybe without the proxies' knowledge
        if direct is not None:
            direct.arrived(self.direction, self.index, outgoing.position, outgoing.total)
            return
        # stamped last: neither the wait for room nor that for the device is the link's doing
        self._post(Op.SEND, outgoing.position, outgoing.total, self.clock(), after)

    def fall_back(self) -> None:
        """The direct path is broken: the proxy is told all that the peer has not consumed, as far as anybody knows."""
        with self._lock:  # whoever sends meanwhile comes after that
            self.direct = None
            if self.loss is not None:  # nothing goes out any more
                return
            before: dict[Key, int] = {}
            for outgoing in self.allocator.waiting():
                key = outgoing.work.key
                if outgoing.told:
                    self._post(Op.SEND, outgoing.position, outgoing.total, self.clock(), before.get(key, 0))
                    outgoing.told = False  # after it: interrupted in between, it is told twice, which does nothing
                before[key] = outgoing.position + 1
            if self._stuck:
                self._post(Op.STUCK, total=1)

    def _tell_stuck(self, stuck: bool) -> None:
        with self._lock:
            self._stuck, direct = stuck, self.direct
        if direct is not None:
            direct.stuck(self.direction, self.index, stuck)
        else:
            self._post(Op.STUCK, total=int(stuck))

    def _fits(self, total: int) -> bool:
        with self._lock:
            return self.allocator.fits(total)

    def _make_room(self, turn: object, total: int, key: Key) -> None:
        self.pump.drain()
        started = time.monotonic()
        warn_after = self.config.warn_full_after_ms / 1e3
        told = first = False

        def may_go_on() -> bool:
            if self.fate.error is not None or self.loss is not None:
                return True
            is_first = self._line[0] is turn
            return is_first and (not first or self._fits(total) or self.drainer.possible())

        try:
            while True:
                waited = time.monotonic() - started
                self._check(key, waited)
                first = self._line[0] is turn
                if first and self._fits(total):
                    return
                if waited >= self.deadline_s:
                    raise TransferTimeout(
                        f"{key} could not be staged for {self.peer} within {self.deadline_s:g} s: "
                        f"{self.situation()} That rank does not consume, or the link is down: look at its log"
                    )
                if first and not told:
                    told = True
                    self.counters.full += 1
                    self._tell_stuck(True)
                if not self._warned and waited >= warn_after:
                    self._warned = True
                    log.warning("blocked: %s waits for room towards %s: %s", key, self.peer, self.situation())
                if not (first and self.drainer.drain_one()):
                    limit = self.deadline_s if self._warned else min(self.deadline_s, warn_after)
                    self.pump.wait(may_go_on, started + limit)
        finally:
            if told:
                self._tell_stuck(False)
            self.counters.blocked_ms += (time.monotonic() - started) * 1e3

    def _check(self, key: Key, waited: float) -> None:
        self.fate.check()
        if self.loss is not None:
            raise self.loss.about(key, "be sent to", self.peer, waited)

    def situation(self) -> str:
        with self._lock:
            return (
                f"{len(self.allocator)} messages wait in the staging ring, {self.allocator.used} of {self.allocator.window} bytes "
                "(adaptra.transport.ring_mib)."
            )

    def acked(self, position: int) -> None:
        """A message has arrived at the peer's proxy."""
        with self._lock:
            outgoing = self.allocator.find(position)
            if outgoing is not None:
                outgoing.work.arrived(position)

    def consumed(self, position: int) -> None:
        """A message has been copied out at the peer; that it had arrived may not have been heard."""
        with self._lock:
            outgoing = self.allocator.find(position)
            if outgoing is not None:
                outgoing.work.arrived(position)
                # not when it is acknowledged: what was sent before it may still be under way
                if self._newest.get(outgoing.work.key) is outgoing:
                    del self._newest[outgoing.work.key]
                self.allocator.consume(position)  # last: after it, the position is not known here any more

    def abort(self, loss: Loss) -> None:
        """Nothing more goes out: fails what has not arrived, and every later send."""
        with self._lock:
            self.loss = self.loss or loss
            for outgoing in self.allocator.waiting():
                outgoing.work.complete(loss)

    def refuse(self, loss: Loss) -> None:
        """No later send is taken, what waits still goes out. `EventPump.wake` has to follow."""
        self.loss = self.loss or loss
