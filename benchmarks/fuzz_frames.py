"""Cases of `benchmarks.fuzz` after authentication: frames of a peer that has gone mad, against rail, link and peer."""

from __future__ import annotations

import dataclasses
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport.bridge import Writer
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy import peer_prober
from adaptra_plugin.transport.proxy.control import checksum_of
from adaptra_plugin.transport.proxy.endpoint_bridge import EndpointBridge
from adaptra_plugin.transport.proxy.events import LaneKey, Rings
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose
from adaptra_plugin.transport.proxy.loop import READ, Timer
from adaptra_plugin.transport.proxy.peer import Neighbour, Peer
from adaptra_plugin.transport.proxy.rails import stream
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind
from adaptra_plugin.transport.proxy.rails.registry import FACTORIES
from adaptra_plugin.transport.proxy.rails.stream import StreamRail
from adaptra_plugin.transport.proxy.server import Proxy
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.wire import (
    MAX_BODY_BYTES,
    POSITIONS,
    TIMES,
    UNIT,
    Flag,
    FrameHeader,
    FrameKind,
)
from adaptra_plugin.transport.types import Address, Direction, EndpointInfo, PeerInfo
from benchmarks.fuzz_inputs import TIMES as ODD_TIMES
from benchmarks.fuzz_inputs import mutated, number, odd_json

CAPACITY = 64 << 10
LANES = 2
_BITS = {"flags": 8, "direction": 8, "lane": 8, "after": 32}
_FIELDS = [field.name for field in dataclasses.fields(FrameHeader) if field.name not in ("kind", "sent")]


class Traffic:
    """A loop and a socket in one, without a kernel in between."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.now = 100.0
        self.incoming = b""
        self._at = 0
        self.step = 1 << 20
        self.taken = 0
        self.takes = True
        self.ended = False
        self._handler: Callable[[int], None] | None = None
        self._posted: deque[Callable[[], None]] = deque()

    # --- the loop

    def clock(self) -> float:
        return self.now

    def watch(self, sock: Any, events: int, handler: Callable[[int], None]) -> None:
        self._handler = handler if events else None

    def post(self, run: Callable[[], None]) -> None:
        self._posted.append(run)

    def call_at(self, when: float, run: Callable[[], None]) -> Timer:
        return Timer(when, run)

    def call_later(self, delay_s: float, run: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay_s, run)

    def stop(self) -> None: ...

    def complete(self) -> None:
        for _ in range(100):
            if not self._posted:
                return
            self._posted.popleft()()
        raise AssertionError("the loop is kept busy for ever")

    def run(self) -> None:
        """Until all that has come is read, or nobody reads any more."""
        for _ in range(100_000):
            handler = self._handler
            if handler is None or (self._at >= len(self.incoming) and not self.ended):
                return
            handler(READ)
            self.complete()
        raise AssertionError("bytes are not taken")

    # --- the socket

    def fileno(self) -> int:
        return 0

    def recv_into(self, window: memoryview) -> int:
        if self._at >= len(self.incoming):
            if self.ended:
                return 0
            raise BlockingIOError
        nbytes = min(len(window), self.step, len(self.incoming) - self._at)
        window[:nbytes] = self.incoming[self._at : self._at + nbytes]
        self._at += nbytes
        return nbytes

    def recv(self, limit: int) -> bytes:
        window = memoryview(bytearray(limit))
        return bytes(window[: self.recv_into(window)])

    def sendmsg(self, views: list[memoryview]) -> int:
        if not self.takes:
            raise BlockingIOError
        nbytes = sum(map(len, views))
        self.taken += nbytes
        return nbytes

    def setsockopt(self, *args: int) -> None:
        assert 0 < args[2] <= 1 << 20

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", 1)

    getpeername = getsockname

    def close(self) -> None: ...


class _Pipe:
    """The proxy's end of the control stream: takes everything."""

    def send(self, data: memoryview) -> int:
        return len(data)


class _Bridge(EndpointBridge):
    """To an endpoint that takes everything."""

    def __init__(self) -> None:
        self._records = deque()
        self._controls = []
        self._passing = deque()
        self._writer = Writer(_Pipe())  # type: ignore[arg-type]

    def flush_control(self) -> None:
        self._put_controls()
        self._writer.flush()


class Owner(Proxy):
    """The real proxy's reports, without its sockets."""

    def __init__(self, loop: Traffic) -> None:
        self.loop = loop  # type: ignore[assignment]
        block = TransportConfig(ring_mib=1).model_dump(mode="json")
        self.settings = ProxySettings.of(block | {"segment_kib": 8, "cpus": None, "spin_us": 0.0})
        self.me = PeerInfo(0, 0, "a")
        self.endpoint_info = ENDPOINT_INFO
        self.secret = b"x" * 32
        self.factories = [make() for make in FACTORIES]
        self._bridge = _Bridge()
        self._peers = {}
        self._connecting = self._closing = None

    def wrap(self, rail: Rail, peer: Peer) -> Rail:
        return rail


ENDPOINT_INFO = EndpointInfo((Address("127.0.0.1", 1),), 1 << 20, LANES, boot="b", unix="u")


class Frames:
    """Rail, link and peer anew in every case; only the memory of the rings stays."""

    def __init__(self) -> None:
        keys = [(direction, lane) for direction in Direction for lane in range(LANES)]
        self._rings: dict[LaneKey, Rings] = {key: Rings(Memfd.create(CAPACITY), Memfd.create(CAPACITY)) for key in keys}

    def close(self) -> None:
        for rings in self._rings.values():
            rings.ring.close()
            rings.receive_ring.close()

    def _peer(self, rng: random.Random, traffic: Traffic) -> Peer:
        near = rng.random() < 0.95
        owner = Owner(traffic)
        found = Peer(
            owner,
            PeerInfo(1, 1, "b"),
            ENDPOINT_INFO,
            Neighbour(self._rings, CAPACITY) if near else None,
            dials=False,
        )
        owner._peers = {1: found}
        if near and rng.random() < 0.3:
            found.stands(StreamRail(RailKind.SHM, "shm", found.link, traffic, traffic), ready=True)  # type: ignore[arg-type]
        else:
            reason = found.adopt(traffic, Claim(1, 1, 0, Purpose.TCP, 0))  # type: ignore[arg-type]
            assert reason is None, reason
        if near and rng.random() < 0.5:  # something to acknowledge, and to consume
            for index in range(rng.randint(1, 6)):
                direction = rng.choice(list(Direction))
                found.link.send(direction, rng.randrange(LANES), index * 10240, rng.randint(1, 10240), 99.0, 0)
            found.link.pump()
        return found

    def headers(self, rng: random.Random, *, by_reference: bool, sent: int) -> list[tuple[FrameHeader, bytes]]:
        """Frames that a sane peer might send, with odd ones in between, and bodies. `sent`: what it may acknowledge."""
        found: list[tuple[FrameHeader, bytes]] = []
        sequence = 0
        position = dict.fromkeys(self._rings, 0)
        strange = rng.choice((0.0, 0.05, 0.3, 1.0))
        for _ in range(rng.choice((1, 2, 4, 8, 16))):
            kind = rng.choice(list(FrameKind)) if rng.random() < 0.5 else FrameKind.SEGMENT
            key = rng.choice(list(self._rings))
            header, body = FrameHeader(kind, direction=key[0], lane=key[1]), b""
            if kind not in (FrameKind.ACK, FrameKind.PING, FrameKind.PONG, FrameKind.NACK):
                sequence += 1
                header.sequence = sequence
            header.ack = rng.randint(0, sent)
            if kind is FrameKind.SEGMENT:
                header.message, header.sent = position[key], 99.0
                header.total = header.length = rng.choice((1, 64, 200, 3000, 5000))
                position[key] += -(-header.total // UNIT) * UNIT
                if rng.random() < (0.5 if by_reference else 0.01):
                    header.flags = int(Flag.REFERENCE)
                else:
                    body = bytes(header.length)
                if rng.random() < 0.3:
                    header.after = max(0, header.message // UNIT - rng.randint(0, 3))
            elif kind is FrameKind.NACK:
                header.message = rng.randint(0, sent)
            elif kind is FrameKind.CONSUMED:
                header.message = rng.randrange(6) * 10240
                entries = [POSITIONS.pack(*key, rng.randrange(6) * 10240) for _ in range(rng.randint(0, 4))]
                if rng.random() < strange:
                    entries.append(POSITIONS.pack(number(rng, 8), number(rng, 8), number(rng, 64)))
                body = b"".join(entries) * rng.choice((1, 1, 1, 100))
            elif kind is FrameKind.STUCK:
                header.message, header.total = sequence, rng.randint(0, 1)
            elif kind in (FrameKind.CONTROL, FrameKind.RAIL):
                header.message = sum(h.kind is FrameKind.CONTROL for h, _ in found) + 1
                body = odd_json(rng, rng.choice(_MESSAGES)) if rng.random() < max(strange, 0.3) else b'{"closed":"shm"}'
            elif kind is FrameKind.PING:
                header.sent = 99.0
            elif kind is FrameKind.PONG:
                header.sent = 99.0
                body = TIMES.pack(*(rng.choice(ODD_TIMES) if rng.random() < strange else 99.0 for _ in range(2)))
            header.length = header.length if kind is FrameKind.SEGMENT else len(body)
            if kind is not FrameKind.SEGMENT and rng.random() < 0.1:
                body, header.length = self._resized(rng, body)
            if body and (kind is not FrameKind.SEGMENT or rng.random() < 0.3):
                header.flags |= Flag.VERIFIED
                header.checksum = checksum_of([memoryview(body)])
            if rng.random() < strange * 0.5:
                self._spoil(rng, header)
                if kind is FrameKind.SEGMENT and rng.random() < 0.8:
                    # as many bytes as it announces, so that the frame is complete
                    body = bytes(header.body_bytes) if header.length <= CAPACITY else body
            found.append((header, body))
        return found

    @staticmethod
    def _resized(rng: random.Random, body: bytes) -> tuple[bytes, int]:
        length = rng.choice((0, 1, 15, 16, 17, 512, 528, 65536, 65537))
        if rng.random() < 0.003:
            length = rng.choice((MAX_BODY_BYTES, MAX_BODY_BYTES + 1))
        return (body * (length // len(body) + 1) if body else bytes(length))[:length], length

    @staticmethod
    def _spoil(rng: random.Random, header: FrameHeader) -> None:
        """One field, or two, that no sane peer would send; the checksum of the header is right all the same."""
        for _ in range(rng.choice((1, 1, 1, 2))):
            name = rng.choice((*_FIELDS, "kind", "sent", "at", "length", "total", "message", "floor", "sequence"))
            if name == "kind":
                header.kind = rng.choice((*FrameKind, 0, 10, 255))  # type: ignore[assignment]
            elif name == "sent":
                header.sent = rng.choice(ODD_TIMES)
            elif header.kind is not FrameKind.SEGMENT and rng.random() < 0.2:
                header.length = number(rng, 64, header.length)
            else:
                value = number(rng, _BITS.get(name, 64), int(getattr(header, name)))
                if name in ("direction", "lane") and rng.random() < 0.8:
                    value %= 3
                elif name == "flags" and rng.random() < 0.8:
                    value %= 8
                setattr(header, name, value)

    def __call__(self, rng: random.Random) -> str:
        traffic = Traffic()
        other = self._peer(rng, traffic)
        connection = next(iter(other.link.connections.values()))
        frames = self.headers(rng, by_reference=connection.rail.by_reference, sent=connection.sequence)
        raw = b"".join(header.pack() + body for header, body in frames)
        if rng.random() < 0.2:
            raw = mutated(rng, raw, [header.pack() for header, _ in frames])
        traffic.incoming = raw
        traffic.step = rng.choice((1 << 20, 1 << 20, 4096, 100)) if len(raw) < 64 << 10 else 1 << 20
        traffic.ended = rng.random() < 0.3
        traffic.takes = rng.random() < 0.9
        traffic.run()
        if not other.gone:
            other.link.flush()
            traffic.now += rng.choice((0.1, 1.0, 10.0))
            other.link.tick()
            traffic.complete()
            other.stats()
        failed = not other.link.connections
        bounded(other)
        other.close()
        return "refused" if failed else "taken"


_MESSAGES: tuple[dict[str, Any], ...] = (
    {"closed": "tcp0"},
    {"skip": "shm", "why": "it has none"},
    {"mapped": "shm"},
    {"open": "rdma0", "qp": 17, "gid": "fe80::1"},
)


def bounded(other: Peer) -> None:
    """What a peer can make this side remember is limited by the ring, the window and the number of lanes."""
    link = other.link
    for inbox in link._arrivals.inboxes.values():
        room = inbox.receive_ring.capacity // UNIT
        assert len(inbox.messages) <= room + 1 and len(inbox.gone) <= room + 1, "more messages than the ring can hold"
    for connection in link.connections.values():
        assert connection.inflight == sum(sent.nbytes for sent in connection.under_way)
    assert len(other.skipped) <= 64, f"{len(other.skipped)} rails given up, which do not exist"


def flood(rng: random.Random, frames: Frames, count: int, kind: str) -> Peer:
    """Thousands of frames of one sort, each of them harmless: what do they leave behind?

    `kind`: one of `FLOODS`.
    """
    traffic = Traffic()
    other = None
    while other is None or not other.near:
        other = frames._peer(rng, traffic)
    traffic.takes = False  # it reads nothing either
    for index in range(1, count + 1):
        header, body = FrameHeader(FrameKind.PING, sent=1.0), b""
        if kind == "acks":
            header = FrameHeader(FrameKind.SEGMENT, index, message=0, total=64, at=index % 64, length=1, sent=1.0)
            body = b"x"
        elif kind == "nacks":
            header = FrameHeader(FrameKind.NACK, message=index)
        elif kind == "positions":
            header = FrameHeader(FrameKind.SEGMENT, index, message=index * UNIT, total=64, length=1, sent=1.0)
            body = b"x"
        elif kind == "floors":
            at = index * UNIT
            header = FrameHeader(FrameKind.SEGMENT, index, message=at, total=64, length=1, floor=at, sent=1.0)
            body = b"x"
        elif kind == "controls":
            body = b'{"a":"%s"}' % (b"x" * 60_000)
            header = FrameHeader(FrameKind.CONTROL, index, message=index + 1, length=len(body))
        elif kind == "skips":
            body = b'{"skip":"%d"}' % index
            header = FrameHeader(FrameKind.RAIL, length=len(body))
        elif kind == "stuck":
            header = FrameHeader(FrameKind.STUCK, index, message=index)
        if body and header.kind is not FrameKind.SEGMENT:
            header.flags, header.checksum = int(Flag.VERIFIED), checksum_of([memoryview(body)])
        traffic.incoming = header.pack() + body
        traffic._at = 0
        traffic.run()
        if index % 16 == 0 and not other.gone:
            other.link.flush()
        if not other.link.connections:
            break
    return other


FLOODS = ("pings", "acks", "nacks", "positions", "floors", "controls", "skips", "stuck")


def instrument() -> Callable[[], None]:
    """Bodies of frames are allocated by the rail: a hook sees every length. Returns what undoes it."""

    def limited(argument: Any = b"") -> bytearray:
        assert not isinstance(argument, int) or argument <= MAX_BODY_BYTES, f"{argument} bytes are allocated"
        return bytearray(argument)

    def undo() -> None:
        del stream.bytearray  # type: ignore[attr-defined]
        peer_prober.Probe = probe  # type: ignore[misc]

    probe = peer_prober.Probe
    stream.bytearray = limited  # type: ignore[attr-defined]
    peer_prober.Probe = _NoProbe  # type: ignore[assignment,misc]
    return undo


class _NoProbe:
    """Nobody is dialled."""

    def __init__(self, *args: Any) -> None: ...
    def close(self) -> None: ...
