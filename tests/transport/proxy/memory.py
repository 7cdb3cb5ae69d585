"""Rails of memory, with a clock of their own: nothing waits, everything can be repeated.

`World` is clock and event queue; `Cable` is a rail's two ends, with latency, bandwidth and the ways in which real cables
go wrong.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from adaptra_plugin.transport.proxy.link import Link
from adaptra_plugin.transport.proxy.loop import Timer
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail, RailKind
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, FrameHeader, FrameKind, MalformedFrame, parse


class World:
    """Clock (s) and events; after each of them `turn_ended` is called, as the proxy's loop does after a turn."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events = 0
        self.turn_ended: list[Callable[[], None]] = []
        self._queue: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now

    def call_at(self, when: float, run: Callable[[], None]) -> Timer:
        timer = Timer(max(when, self.now), run)
        heapq.heappush(self._queue, (timer.when, next(self._order), timer))
        return timer

    def call_later(self, delay_s: float, run: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay_s, run)

    def post(self, run: Callable[[], None]) -> None:
        self.call_at(self.now, run)

    def close(self) -> None:
        self._queue.clear()  # and with it views of memory

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Until something is true (then True), at most `seconds`."""
        end = self.now + seconds
        while not until():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return until()
            self.now, _, timer = heapq.heappop(self._queue)
            if not timer.cancelled:
                self.events += 1
                timer.run()
                for ended in self.turn_ended:
                    ended()
        return True


@dataclass
class Cable:
    """What a rail is made of. `cut`: nothing comes through, and nobody is told; what was sent meanwhile comes later."""

    name: str
    kind: RailKind = RailKind.TCP
    latency_s: float = 1e-4
    bytes_per_s: float = 1e9
    piece_bytes: int = 256 << 10
    down: bool = False
    """Attempts to connect fail."""
    cut: bool = False
    stalled: deque[Callable[[], None]] = field(default_factory=deque)
    rails: list[MemoryRail] = field(default_factory=list)

    def heal(self) -> None:
        self.cut = False
        while self.stalled:
            self.stalled.popleft()()

    def snap(self) -> None:
        """The connection ends, which both sides see."""
        for rail in list(self.rails):
            rail.fail("its cable snapped")

    @property
    def carried(self) -> int:
        """Bytes that have left over the connection that stands."""
        return sum(rail.carried for rail in self.rails)


class MemoryRail(Rail):
    """One end. Bytes are read from the sender's ring when they leave, and written piece by piece as they come."""

    def __init__(self, world: World, cable: Cable, sink: Link) -> None:
        super().__init__(cable.kind, cable.name, sink)
        self.by_reference = cable.kind is RailKind.SHM
        self.other: MemoryRail | None = None
        self.carried = 0
        self.mute = False  # its frames vanish
        self._world = world
        self._cable = cable
        self._out: deque[tuple[bytes | memoryview, bool]] = deque()  # a piece, and whether it is the frame's last
        self._backlog = 0
        self._busy = self._broken = False
        self._header: FrameHeader | None = None
        self._windows: list[memoryview] | None = None
        self._body = bytearray()
        self._waste = False
        cable.rails.append(self)

    # --- out

    def submit(self, frame: Frame) -> None:
        if self.closed or self._broken:
            return
        assert sum(map(len, frame.body)) == frame.header.body_bytes
        self._put(frame.header.pack(), last=not frame.header.body_bytes)
        pieces = [
            view[at : at + self._cable.piece_bytes]
            for view in map(memoryview, frame.body)
            for at in range(0, len(view), self._cable.piece_bytes)
        ]
        for index, piece in enumerate(pieces):
            self._put(piece, last=index == len(pieces) - 1)
        if not self._busy:
            self._leave()

    def _put(self, piece: bytes | memoryview, *, last: bool) -> None:
        self._out.append((piece, last))
        self._backlog += len(piece)

    @property
    def backlog(self) -> int:
        return self._backlog

    def _leave(self) -> None:
        """The next piece; small ones together."""
        if self.closed:
            return
        self._busy = bool(self._out)
        if not self._out:
            return
        batch = [self._out.popleft()]
        while self._out and sum(len(piece) for piece, _ in batch) + len(self._out[0][0]) <= self._cable.piece_bytes:
            batch.append(self._out.popleft())
        nbytes = sum(len(piece) for piece, _ in batch)
        self._world.call_later(nbytes / self._cable.bytes_per_s, functools.partial(self._left, batch, nbytes))

    def _left(self, batch: list[tuple[bytes | memoryview, bool]], nbytes: int) -> None:
        if self.closed:
            return
        self._backlog -= nbytes
        self.carried += nbytes
        other = self.other
        assert other is not None
        if not self.mute:
            found = [(bytes(piece), last) for piece, last in batch]
            self._world.call_later(self._cable.latency_s, functools.partial(other.come, lambda: other._receive(found)))
        self._leave()

    # --- in

    def come(self, what: Callable[[], None]) -> None:
        if self._cable.cut or self._cable.stalled:
            self._cable.stalled.append(functools.partial(self._world.post, what))
        else:
            what()

    def _receive(self, batch: list[tuple[bytes, bool]]) -> None:
        try:
            for piece, last in batch:
                if self.closed or self._broken:
                    return
                self._take(piece, last)
        except MalformedFrame as error:
            self.fail(f"what came is no frame: {error}")

    def _take(self, piece: bytes, last: bool) -> None:
        if self._header is None:
            assert len(piece) == HEADER_BYTES
            self._header = header = parse(piece, limit=self.sink.limit, lanes=self.sink.lanes)
            self._waste = False
            self._windows = None
            self._body = bytearray()
            if header.kind == FrameKind.SEGMENT and header.body_bytes:
                self._windows = self.sink.place(self, header)
                self._waste = self._windows is None
        elif self._windows is not None and not self._waste:
            done = 0
            while done < len(piece):
                window = self._windows[0]
                step = min(len(window), len(piece) - done)
                window[:step] = piece[done : done + step]
                done += step
                self._windows[:1] = [window[step:]] if step < len(window) else []
        elif not self._waste:
            self._body += piece
        if last:
            header, self._header = self._header, None
            self.sink.arrived(self, header, bytes(self._body))

    def discard(self) -> None:
        assert self._header is not None and self._windows is not None
        self._waste = True

    # --- the end

    def fail(self, reason: str) -> None:
        self._broken = True
        self._world.post(functools.partial(self._report, reason))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._out.clear()
            if self in self._cable.rails:
                self._cable.rails.remove(self)
            if (other := self.other) is not None:
                ended = functools.partial(other._report, "its connection was closed")
                self._world.call_later(self._cable.latency_s, functools.partial(other.come, ended))
