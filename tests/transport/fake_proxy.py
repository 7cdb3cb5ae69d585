"""A proxy that a test plays itself: for records in any order, and ends at any moment, that a real one seldom produces."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport import Address, Direction, Endpoint, EndpointInfo, PeerInfo
from adaptra_plugin.transport.bridge import MAX_PACKET, RECORD, Op, Reader, Writer, pairs
from adaptra_plugin.transport.frames import split
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.spawn import Running
from adaptra_plugin.transport.tensors import describe

from .support import SECRET, config, info, until


class FakeProxy(Running):
    """Answers `start`, `connect`, `stats` and `close` by itself; the rest is up to the test. The peer is rank 1."""

    def __init__(self, rank: int = 0, lanes: int = 1, ring_bytes: int = 1 << 20) -> None:
        (self.data, self.far_data), (self.control, self.far_control) = pairs()
        self.far_data.settimeout(10)
        self.endpoint_info = EndpointInfo((Address("127.0.0.1", 1),), ring_bytes, lanes)
        self.heard: list[dict[str, Any]] = []
        self.memfds: list[Memfd] = []
        self.answers_close = True
        self._lock = threading.Lock()
        self._writer = Writer(self.far_control)
        self._pending: list[tuple[Any, ...]] = []
        self._thread = threading.Thread(target=self._serve, name="fake-proxy", daemon=True)
        self._thread.start()

    def __call__(self, rank: int) -> FakeProxy:
        return self

    def tell(self, event: str, descriptors: Sequence[int] = (), **fields: Any) -> None:
        with self._lock:
            self._writer.put({"event": event, **fields}, descriptors)
            assert self._writer.flush()

    def _serve(self) -> None:
        reader = Reader(self.far_control)
        while True:
            try:
                found = reader.receive()
            except OSError:
                return
            for message, descriptors in found or ():
                self._command(message, descriptors)
            if found is None:
                return

    def _command(self, message: dict[str, Any], descriptors: list[int]) -> None:
        self.memfds += [Memfd(fd, self.endpoint_info.ring_bytes) for fd in descriptors]
        self.heard.append(message)
        if message["op"] == "start":
            self.tell("ready", endpoint_info=self.endpoint_info.to_text())
        elif message["op"] == "connect":
            self.tell("connected", links={"1": {"rails": ["fake"], "why": "", "direct": False}})
        elif message["op"] == "stats":
            self.tell("stats", id=message["id"], data={"refused_connections": 0, "peers": {}})
        elif message["op"] == "close" and self.answers_close:
            self.tell("closed")
            self.vanish()

    def ring(self, direction: Direction, lane: int = 0) -> Memfd:
        """What the endpoint fills."""
        return self.memfds[2 * (direction * self.endpoint_info.connections + lane)]

    def receive_ring(self, direction: Direction, lane: int = 0) -> Memfd:
        return self.memfds[2 * (direction * self.endpoint_info.connections + lane) + 1]

    # --- records

    def record(
        self, op: Op, direction: Direction = Direction.ACTIVATION, position: int = 0, total: int = 0, **more: Any
    ) -> None:
        self.far_data.send(
            RECORD.pack(
                *(op, direction, more.get("lane", 0), more.get("flags", 0), 1, position, total),
                *(more.get("value", 0.0), 0),
            )
        )

    def next(self) -> tuple[Any, ...]:
        """The endpoint's next record: op, direction, lane, flags, rank, position, total, value, after."""
        while not self._pending:
            packet = self.far_data.recv(MAX_PACKET)
            assert packet, "the endpoint has closed its data socket"
            self._pending += RECORD.iter_unpack(packet)
        return self._pending.pop(0)

    def expect(self, op: Op) -> tuple[Any, ...]:
        record = self.next()
        assert record[0] == op, f"{Op(record[0]).name} came instead of {op.name}"
        return record

    def deliver(
        self,
        key: Any,
        tensor: Any,
        position: int,
        *,
        memfd: Memfd | None = None,
        flags: int = 0,
        step: int = 1 << 30,
    ) -> int:
        """A message from the peer arrives at `position`, in parts of `step` bytes; where the next one may go."""
        meta, payload = describe([tensor])
        data = tensor.numpy().tobytes().ljust(payload, b"\0")
        for part in split(key, 0, 1, len(meta), payload, step):
            body = data[part.at : part.at + part.payload_bytes]
            raw = part.pack() + (b"" if part.at else meta) + body
            (memfd or self.receive_ring(key.direction)).write(position, raw)
            self.record(Op.ARRIVED, key.direction, position, len(raw), flags=flags)
            position += len(raw)
        return position

    # --- the end

    def vanish(self) -> None:
        """Both sockets end, as those of a proxy that dies."""
        for end in (self.far_data, self.far_control):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def join(self, timeout_s: float) -> bool:
        return True

    def kill(self) -> None:
        self.vanish()

    def obituary(self) -> str:
        return "the fake proxy has vanished"

    def abandon(self) -> None:
        self.far_data.close()
        self.far_control.close()

    def close(self) -> None:
        self.vanish()
        self._thread.join(10)
        self.abandon()
        for memfd in self.memfds:
            memfd.close()


def connected(**changes: Any) -> tuple[Endpoint, FakeProxy]:
    """An endpoint of rank 0 with rank 1 as its neighbour, and the proxy that the test plays."""
    settings: TransportConfig = config(**{"connections_per_direction": 1, **changes})
    fake = FakeProxy(lanes=settings.connections_per_direction, ring_bytes=settings.ring_mib << 20)
    endpoint = Endpoint(PeerInfo(0, 0, "n"), settings, SECRET, spawn=fake)
    endpoint.connect({1: (info(1), fake.endpoint_info)}, neighbours=[1], coordinator=0)
    until(lambda: fake.memfds, "rings")
    return endpoint, fake
