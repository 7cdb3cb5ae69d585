"""Two processes, a and b, with RDMA rails between them: a sink that remembers, and a loop that runs until something is true."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail
from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.rail import RdmaRail
from adaptra_plugin.transport.proxy.wire import FrameHeader, FrameKind
from adaptra_plugin.transport.types import Direction
from tests.rdma import wires
from tests.rdma.pairs import MIB, PATIENCE_S

LANES = [(Direction.ACTIVATION, 0), (Direction.GRADIENT, 0)]
LANE = LANES[0]


class Half:
    """One of the two processes: `side` a or b, and a line to the other one."""

    def __init__(self, side: str, talk: socket.socket) -> None:
        self.side = side
        # one for both would lose what it read ahead
        self._lines_in, self._lines_out = talk.makefile("r"), talk.makefile("w")

    def swap(self, value: Any = None) -> Any:
        """Gives a value to the other process and returns the one it gives; both wait for each other."""
        self._lines_out.write(json.dumps(value) + "\n")
        self._lines_out.flush()
        line = self._lines_in.readline()
        assert line, "the other process has ended"
        return json.loads(line)

    def close(self) -> None: ...


class Host(Half):
    """One that is the sink of its rails."""

    def __init__(self, side: str, talk: socket.socket, ring_bytes: int = 4 * MIB) -> None:
        super().__init__(side, talk)
        self.limit = ring_bytes
        self.lanes = 1
        self.loop = Loop()
        self.rings = {key: Memfd.create(ring_bytes) for key in LANES}
        self.receive_rings = {key: Memfd.create(ring_bytes) for key in LANES}
        for memfd in (*self.rings.values(), *self.receive_rings.values()):
            _ = memfd.view  # mapped now: that takes a descriptor
        self.nics: dict[int, Nic] = {}
        self.rails: dict[str, RdmaRail] = {}
        self.came: list[tuple[str, FrameHeader, bytes]] = []
        """(rail, header, body; of segments: what the receive ring holds there)"""
        self.failures: dict[str, str] = {}
        self.expected: Counter[str] = Counter()
        """Frames that were waited for, by rail."""
        self.declined: set[int] = set()
        """Messages that `place` does not want."""
        self.on_arrived: Callable[[Rail, FrameHeader, bytes], None] = lambda rail, header, body: None

    # --- as a sink

    def place(self, rail: Rail, header: FrameHeader) -> list[memoryview] | None:
        if header.message in self.declined:
            return None
        return self.receive_rings[header.direction, header.lane].slices(header.message + header.at, header.length)

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        if header.kind == FrameKind.SEGMENT:
            body = self.receive_rings[header.direction, header.lane].read(header.message + header.at, header.length)
        self.came.append((rail.name, header, body))
        self.on_arrived(rail, header, body)

    def failed(self, rail: Rail, reason: str) -> None:
        assert rail.closed
        self.failures[rail.name] = reason

    def over(self, name: str) -> list[bytes]:
        """Bodies that have come over a rail."""
        return [body for rail, _, body in self.came if rail == name]

    def connect(self, wire: int = 0, **options: Any) -> RdmaRail:
        """Rail `rdma<wire>`, connected; side a offers first."""
        if wire not in self.nics:
            self.nics[wire] = Nic(self.loop, wires.device(self.side, wire), address=wires.address(self.side, wire))
        rail = self.rails[f"rdma{wire}"] = RdmaRail(f"rdma{wire}", self, self.nics[wire], self.rings, **options)
        if self.side == "a":
            self.swap(rail.offer())
            rail.accept(self.swap())
        else:
            offer = self.swap()
            rail.accept(offer)
            self.swap(rail.offer())
        return rail

    # --- work

    def until(self, condition: Callable[[], Any], what: str = "the condition", patience_s: float = PATIENCE_S) -> None:
        """Runs the loop until it is true."""
        end = time.monotonic() + patience_s
        timer = self.loop.call_at(self.loop.clock() + patience_s, self.loop.stop)
        self.loop.turn_ended = lambda: self.loop.stop() if condition() else None
        if not condition():
            self.loop._stopped = False
            self.loop.run()
        timer.cancel()
        assert condition() or time.monotonic() < end, f"{self.side}: {what} did not come true; {self.failures}"
        assert condition(), f"{self.side}: the loop ended before {what}"

    def idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end or self.loop.call_later(0.01, lambda: None) is None)

    def complete(self) -> None:
        """Until all that was submitted has gone; both processes call it."""
        self.until(lambda: all(rail.backlog == 0 for rail in self.rails.values() if not rail.closed), "backlog 0")

    def segment(self, message: int, data: bytes, at: int = 0, total: int = 0, lane: Any = LANE) -> Frame:
        """A segment whose bytes are put into the ring."""
        self.rings[lane].write(message + at, data)
        header = FrameHeader(
            *(FrameKind.SEGMENT, 1, 0, *lane, message, total or len(data)),
            at=at,
            length=len(data),
            sent=time.monotonic(),
        )
        return Frame(header, self.rings[lane].slices(message + at, len(data)))

    def small(self, body: bytes = b"", number: int = 0) -> Frame:
        kind = FrameKind.CONTROL if body else FrameKind.PING
        return Frame(FrameHeader(kind, message=number, length=len(body)), [body] if body else [])

    def close(self) -> None:
        for rail in self.rails.values():
            rail.close()
        for nic in self.nics.values():
            nic.close()
        self.loop.close()


def _main(
    report: Any, side: str, ends: Any, maker: Any, scenario: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    error = None
    talk, other = ends if side == "a" else reversed(ends)
    other.close()  # or the end of the other process would not be seen
    try:
        host = maker(side, talk, **options)
        try:
            scenario(host)
            host.swap("done")
        finally:
            host.close()
    except BaseException as caught:  # noqa: BLE001  the parent has to hear of it
        error = "".join(traceback.format_exception(caught))
    report.send(error)


@contextlib.contextmanager
def started(scenario: Callable[[Any], Any], maker: type[Half] = Host, **options: Any) -> Iterator[list[Any]]:
    """Forks processes a and b that run `scenario(maker(side, ...))`; (process, report) of each."""
    context = multiprocessing.get_context("fork")
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(40)
    wires.touched()
    running = []
    for side in "ab":
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(sender, side, ends, maker, scenario, options), daemon=True)
        process.start()
        sender.close()
        running.append((process, receiver))
    for end in ends:
        end.close()
    try:
        yield running
    finally:
        for process, _ in running:
            if process.is_alive():
                process.kill()
            process.join(10)


def both(scenario: Callable[[Any], Any], patience_s: float = 60.0, **options: Any) -> None:
    """Runs `scenario(host)` in processes a and b; fails with the tracebacks of those that failed."""
    with started(scenario, **options) as running:
        until = time.monotonic() + patience_s
        errors = []
        for side, (_, report) in zip("ab", running, strict=True):
            try:
                error = report.recv() if report.poll(max(0.0, until - time.monotonic())) else "no result in time"
            except EOFError:
                error = "ended without a result"
            if error:
                errors.append(f"--- {side}: {error}")
        assert not errors, "\n".join(errors)
