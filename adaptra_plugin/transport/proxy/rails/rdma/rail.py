"""Frames over a reliable connected RDMA queue pair.

A segment is one RDMA WRITE WITH IMMEDIATE, which gathers its header and its body, straight from the sender's ring, into the
receiver's *landing*. The immediate says where; its completion, the only one for a segment, says that all is there. The receiver
then asks its link where the body belongs, copies it there, and returns the room. Everything else is small and travels in
SENDs.

Why not write into the receive ring itself: the link sends a segment again over another rail when this one is late, and the
message may then be complete, consumed, and its room used for the next one, while the first write is still on its way. Nothing
could stop that write, and nobody would notice. What lands here is copied only if the link still wants it, so this rail keeps
the promise of all rails: what `place` declines lands nowhere.

Nothing is sent that has nowhere to go (`slots`), so the receiver is never found without a buffer. Everything else that goes
wrong (no acknowledgement after all retries, the port down, an error of the queue pair) ends the rail.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.loop import READ, Timer
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail, RailKind, Sink
from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.offer import check, offer_of
from adaptra_plugin.transport.proxy.rails.rdma.queue_memory import SLOT_BYTES, Pieces, QueueMemory
from adaptra_plugin.transport.proxy.rails.rdma.slots import (
    IMMEDIATES,
    PREFIX_BYTES,
    Budget,
    Debt,
    Prefix,
    SlotKind,
    parse_prefix,
)
from adaptra_plugin.transport.proxy.rails.rdma.verbs import Completion, VerbsError, status_text
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, FrameHeader, FrameKind, MalformedFrame, parse
from adaptra_plugin.transport.types import Direction

SLOTS = 256
"""Receives that are posted, and sends that may be under way."""
LANDING_BYTES = 64 << 20
"""Bodies that may be under way: as many as a link ever has on one rail."""
_HEAD = PREFIX_BYTES + HEADER_BYTES  # in front of a body in the landing
SLOWEST = 1e6
"""A wire that moves fewer bytes per second counts as dead, if nothing else is acknowledged meanwhile."""


@dataclass(slots=True)
class _Waiting:
    """A frame that has not been posted yet, or not all of it. `rest`: what is still to go in slots."""

    header: FrameHeader
    rest: memoryview
    body: Pieces = ()
    """Of a segment, in its ring."""

    @property
    def nbytes(self) -> int:
        return len(self.rest) + sum(nbytes for _, _, nbytes in self.body)


class RdmaRail(Rail):
    """One queue pair. `offer` and `accept`, in either order, then it carries frames.

    The end that accepts before it offers is ready when the other one hears of it, so the other one begins.

    Args:
        rings: what this rank fills, per direction and lane: segments are sent from there.
        timeout_exponent, retries: see `QueuePair.connect`; by default a peer that does not answer is given up after 1.4 s,
            and by our own clock after twice that: devices may take four times as long, and some start anew with every
            request that is posted meanwhile.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        nic: Nic,
        rings: Mapping[tuple[Direction, int], Memfd],
        *,
        landing_bytes: int = LANDING_BYTES,
        slots: int = SLOTS,
        timeout_exponent: int = 16,
        retries: int = 4,
    ) -> None:
        """Raises VerbsError."""
        super().__init__(RailKind.RDMA, name, sink)
        self._nic = nic
        self._loop = nic.loop
        self._patience = (timeout_exponent, retries)
        self._silence_s = 2 * (retries + 1) * 4.096e-6 * 2**timeout_exponent
        self._watchdog: Timer | None = None
        self._progress = 0.0  # when the oldest send that is under way became the oldest
        self._memfds = dict(rings)
        self._broken: str | None = None
        self._offered = False
        self._open = False  # the other end is known to be ready
        self._heard = False
        self.on_heard: Callable[[], None] = lambda: None
        """The other end has been heard for the first time: the rail works both ways. What came follows."""
        self._peer_text = ""
        self._slot_bytes = SLOT_BYTES
        self._budget = Budget(slots, landing_bytes)
        self._debt = Debt(slots, landing_bytes)
        self._target = (0, 0, 0)  # address, key and size of the other end's landing
        self._waiting: deque[_Waiting] = deque()
        self._posted: deque[tuple[int, int]] = deque()  # (slot, bytes) under way, oldest first
        self._free = deque(range(slots))
        self._backlog = 0
        self._partial: tuple[FrameHeader, bytearray] | None = None
        self._memory = QueueMemory(nic, rings, slots, landing_bytes)
        self._pair = self._memory.pair
        nic.listen(self._event)
        self._loop.watch(self._memory.completions, READ, self._ready)

    def describe(self) -> str:
        return f"{self.name} ({self._nic.name} - {self._peer_text or 'not connected'})"

    # --- coming up

    def offer(self) -> dict[str, Any]:
        """What the other end has to `accept`; plain values."""
        self._offered = True
        return offer_of(self._nic, self._memory)

    def accept(self, offer: Mapping[str, Any]) -> None:
        """Connects with the end that made the offer. Raises VerbsError, also for offers that make no sense."""
        check(offer, self.name, self._nic)
        gid = offer["gid"]
        timeout_exponent, retries = self._patience
        self._memory.connected = True
        self._pair.connect(
            self._nic.gid if gid else None,
            number=offer["number"],
            psn=offer["psn"],
            gid=gid or None,
            lid=offer["lid"],
            mtu=min(offer["mtu"], self._nic.port.mtu),
            timeout_exponent=timeout_exponent,
            retries=retries,
        )
        self._peer_text = str(offer.get("name", ""))[:80]
        self._slot_bytes = min(SLOT_BYTES, offer["slot_bytes"])
        self._budget = Budget(offer["slots"], offer["landing"])
        self._target = (offer["address"], offer["key"], offer["landing"])
        if self._offered:
            self._open = True
            self._post(SlotKind.CREDIT, b"", 0)  # the other end waits to hear from this one
            self._pump()

    # --- sending

    def submit(self, frame: Frame) -> None:
        if self.closed or self._broken is not None:
            return
        header = frame.header
        length = header.body_bytes
        if length != sum(len(piece) for piece in frame.body):
            raise ValueError(f"a frame announces {length} bytes and has {sum(map(len, frame.body))}")
        head = header.pack()
        key = (header.direction, header.lane)
        if header.kind == FrameKind.SEGMENT and HEADER_BYTES + length > self._room and self._in_ring(key, frame.body):
            if _HEAD + length > self._budget.landing:
                self._fail(f"a segment of {length} bytes does not fit into the other end's {self._budget.landing}")
                return
            try:
                body = self._nic.ring_pieces(self._memfds[key], header.message + header.at, length)
            except VerbsError as error:
                self._fail(str(error))
                return
            waiting = _Waiting(header, memoryview(head), body)
        else:
            waiting = _Waiting(header, memoryview(b"".join((head, *frame.body))))
        self._backlog += waiting.nbytes
        self._waiting.append(waiting)
        if len(self._waiting) == 1:
            self._pump()

    def _in_ring(self, key: tuple[Direction, int], body: Sequence[memoryview | bytes]) -> bool:
        """Whether these are windows into the ring; a copy (faults that are injected make some) travels in slots."""
        ring = self._memfds[key].view.obj
        return all(isinstance(piece, memoryview) and piece.obj is ring for piece in body)

    @property
    def backlog(self) -> int:
        """Bytes that the other end's device has not acknowledged: what is lost if the rail is closed now."""
        return self._backlog

    @property
    def _room(self) -> int:
        """Bytes of payload in a slot."""
        return self._slot_bytes - PREFIX_BYTES

    def _pump(self) -> None:
        """Posts what there is room for at the other end."""
        try:
            # the last slot is for returning credit
            while self._waiting and self._open and self._free and self._budget.free_slots > 1:
                first = self._waiting[0]
                if first.body:
                    if not self._post_segment(first):
                        return
                    self._waiting.popleft()
                    continue
                piece, first.rest = first.rest[: self._room], first.rest[self._room :]
                self._post(SlotKind.FRAME, piece, len(piece), more=bool(first.rest))
                if not first.rest:
                    self._waiting.popleft()
        except VerbsError as error:
            self._fail(str(error))

    def _post_segment(self, waiting: _Waiting) -> bool:
        """False: the other end has no room for the body now."""
        at = self._budget.place(_HEAD + waiting.header.length)
        if at is None:
            return False
        self._post(SlotKind.SEGMENT, waiting.rest, waiting.nbytes, body=waiting.body, at=at)
        return True

    def _post(
        self,
        kind: SlotKind,
        payload: bytes | memoryview,
        nbytes: int,
        *,
        body: Pieces = (),
        at: int = 0,
        more: bool = False,
    ) -> None:
        """Fills a slot and posts it: with a body into the landing, at `at`. `nbytes`: part of the backlog that has gone when
        it has. Raises VerbsError."""
        slot = self._free.popleft()
        emptied, landed = self._debt.told()
        prefix = Prefix(kind, len(payload), self._budget.sent, emptied, landed, at, more).pack()
        self._budget.sent += 1
        if not self._posted:
            self._progress = self._loop.clock()
            if self._watchdog is None:
                self._watchdog = self._loop.call_later(self._silence_s, self._watch_progress)
        self._posted.append((slot, nbytes))
        if body:
            self._memory.write(slot, prefix, payload, body, at, self._target)
        else:
            self._memory.post(slot, prefix, payload)

    # --- completions

    def _ready(self, mask: int) -> None:
        try:
            for completion in self._memory.completions.drain():
                if self.closed or self._broken is not None:
                    return
                if completion.status:
                    self._fail(self._reason(completion))
                elif completion.received:
                    self._received(completion)
                else:
                    self._sent(completion)
            if self.closed or self._broken is not None:
                return
            self._pump()
            if self._debt.due and self._open and self._free and self._budget.free_slots:
                self._post(SlotKind.CREDIT, b"", 0)
        except VerbsError as error:
            self._fail(str(error))
        except MalformedFrame as error:
            self.garbled = True
            self._fail(f"what came is no frame: {error}")

    @staticmethod
    def _reason(completion: Completion) -> str:
        vendor = f", vendor's code {completion.vendor}" if completion.vendor else ""
        return f"its queue pair failed: {status_text(completion.status)}{vendor}"

    def _sent(self, completion: Completion) -> None:
        slot, nbytes = self._posted.popleft()
        if slot != completion.request:
            raise VerbsError(f"send {completion.request} is complete where {slot} was due")
        self._free.append(slot)
        self._backlog -= nbytes
        self._progress = self._loop.clock()

    def _watch_progress(self) -> None:
        """Devices retry, give up and tell; this is for those that do not."""
        self._watchdog = None
        if self.closed or self._broken is not None or not self._posted:
            return
        silent = self._loop.clock() - self._progress
        patience = self._silence_s + self._posted[0][1] / SLOWEST
        if silent >= patience:
            self._fail(f"no acknowledgement from the remote end for {silent:.1f} s")
        else:
            self._watchdog = self._loop.call_later(patience - silent, self._watch_progress)

    def _received(self, completion: Completion) -> None:
        index, slot = self._memory.received(completion)
        if completion.immediate is not None:
            start, stop = self._debt.window(self._debt.position(completion.immediate), _HEAD)
            slot = self._memory.landing[start:stop]
        prefix = parse_prefix(slot, self._debt.emptied)
        if (prefix.kind is SlotKind.SEGMENT) != (completion.immediate is not None):
            raise MalformedFrame(f"a slot of kind {prefix.kind.name.lower()} came the wrong way")
        payload = bytes(slot[PREFIX_BYTES:])
        self._debt.emptied += 1
        self._memory.post_receive(index)
        self._budget.returned(prefix)
        if not self._heard:
            self._heard = True
            if not self._open:
                self._open = True
                self._post(SlotKind.CREDIT, b"", 0)  # the other end waits to hear from this one too
            self.on_heard()
        if prefix.kind is SlotKind.FRAME:
            self._piece(payload, prefix.more)
        elif prefix.kind is SlotKind.SEGMENT:
            if prefix.at % IMMEDIATES != completion.immediate:
                raise MalformedFrame(f"a segment at {prefix.at} in the landing came with number {completion.immediate}")
            self._segment(payload, prefix.at)

    def _parse(self, raw: bytes) -> FrameHeader:
        if len(raw) < HEADER_BYTES:
            raise MalformedFrame(f"a frame begins with {len(raw)} bytes; a header has {HEADER_BYTES}")
        return parse(raw[:HEADER_BYTES], limit=self.sink.limit, lanes=self.sink.lanes)

    def _piece(self, payload: bytes, more: bool) -> None:
        """A frame, or the next piece of one."""
        if self._partial is None:
            header, body = self._parse(payload), bytearray(payload[HEADER_BYTES:])
        else:
            (header, body), self._partial = self._partial, None
            body += payload
        if len(body) > header.body_bytes or more != (len(body) < header.body_bytes):
            raise MalformedFrame(
                f"a {header.kind.name.lower()} frame announces {header.body_bytes} bytes, {len(body)} came"
            )
        if more:
            self._partial = (header, body)
        elif header.kind == FrameKind.SEGMENT and header.body_bytes:
            self._deliver(header, memoryview(body))
        else:
            self.sink.arrived(self, header, bytes(body))

    def _segment(self, payload: bytes, at: int) -> None:
        """A segment whose body has landed."""
        header = self._parse(payload)
        if header.kind != FrameKind.SEGMENT or len(payload) != HEADER_BYTES or header.body_bytes != header.length:
            raise MalformedFrame(f"a {header.kind.name.lower()} frame has a body in the landing")
        start, stop = self._debt.window(at, _HEAD + header.length)
        try:
            self._deliver(header, self._memory.landing[start + _HEAD : stop])
        finally:
            self._debt.landed = at + _HEAD + header.length

    def _deliver(self, header: FrameHeader, body: memoryview) -> None:
        windows = self.sink.place(self, header)
        done = 0
        for window in windows or ():
            window[:] = body[done : done + len(window)]
            done += len(window)
        self.sink.arrived(self, header)

    # --- the end

    def _event(self, what: str) -> None:
        """The device reports something."""
        if what in ("port down", "device failed"):
            self._fail(f"{self._nic.name}: {what}")
        elif "queue pair failed" in what or "completion queue" in what:
            try:
                state = self._pair.state
            except VerbsError as error:
                self._fail(str(error))
                return
            if state == "ERR":
                self._fail(f"{self._nic.name}: {what}")

    def _fail(self, reason: str) -> None:
        """Tells the link from the loop, not from here: it may be in the middle of using this rail."""
        if not self.closed and self._broken is None:
            self._broken = reason
            self._loop.watch(self._memory.completions, 0, self._ready)
            self._loop.post(functools.partial(self._report, reason))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._nic.forget(self._event)
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        self._loop.watch(self._memory.completions, 0, self._ready)
        self._memory.close()
        self._waiting.clear()
        self._posted.clear()
        self._partial = None
