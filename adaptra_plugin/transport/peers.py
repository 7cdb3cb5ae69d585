"""One peer, seen from the proxy: its streams, its clock, and whether it is there, gone for good reason, or lost."""

from __future__ import annotations

import socket
from collections.abc import Collection
from typing import Any, Protocol

from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.transport.channel import Link
from adaptra_plugin.transport.clock import ClockOffset
from adaptra_plugin.transport.frames import MalformedFrame
from adaptra_plugin.transport.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.loop import Loop
from adaptra_plugin.transport.streams import DataStream, ServiceStream, Stream
from adaptra_plugin.transport.tickets import Loss
from adaptra_plugin.transport.types import Address, Direction, PeerInfo

FIRST_PINGS = 8
"""Pings in a row before a link counts as connected: the offset of the clocks must be known for the first message."""
PING_EVERY_S = 2.0

Slot = tuple[Purpose, int]

_LOOK = "Its process ended or its host went down: look at the end of its log, then restart the job from a checkpoint."
_LEFT = Loss(PeerLostError, "it has ended and closed its connections", "Look at the end of its log for the reason.")


class Watcher(Protocol):
    """Who is told what happens to peers; called on the proxy's thread."""

    def peer_up(self, peer: Peer) -> None: ...
    def peer_gone(self, peer: Peer, loss: Loss, expected: bool) -> None: ...
    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None: ...
    def peer_closed(self, peer: Peer) -> None: ...


class Peer:
    """Owns the streams to one rank. `link` holds the lanes of a neighbour; None: only control messages."""

    def __init__(self, info: PeerInfo, address: Address, link: Link | None, loop: Loop, watcher: Watcher) -> None:
        self.info = info
        self.address = address
        self.link = link
        self.clock = link.clock if link is not None else ClockOffset()
        self.missing: set[Slot] = {(Purpose.SERVICE, 0)}
        if link is not None:
            self.missing |= {(Purpose(d + 1), index) for d in Direction for index in range(link.connections)}
        self.departed = False
        self.loss: Loss | None = None
        self._loop = loop
        self._watcher = watcher
        self._streams: dict[Slot, Stream] = {}
        self._closing = False
        self._announced = False

    @property
    def streams(self) -> Collection[Stream]:
        return self._streams.values()

    @property
    def up(self) -> bool:
        """All streams stand and, towards a neighbour, the clocks are compared."""
        return not self.missing and (self.link is None or self.clock.count >= FIRST_PINGS)

    # --- streams come

    def adopt(self, sock: socket.socket, claim: Claim, settings: Settings) -> str | None:
        """Takes over a connection that has passed its handshake, or says why it has no place here."""
        slot = (claim.purpose, claim.index)
        if slot in self._streams:
            return f"rank {self.info.rank} is connected for {claim} already"
        if slot not in self.missing:
            return f"no connection for {claim} is wanted with rank {self.info.rank}"
        if self.departed or self.loss is not None or self._closing:
            return f"rank {self.info.rank} has left already"
        self.missing.discard(slot)
        stream: Stream
        if claim.purpose == Purpose.SERVICE:
            stream = ServiceStream(self._loop, sock, self, str(claim))
        else:
            assert self.link is not None
            outbound, inbound = self.link.lanes(Direction(claim.purpose - 1), claim.index)
            outbound.limit = min(outbound.limit, settings.ring_bytes)
            stream = DataStream(self._loop, sock, self, str(claim), outbound, inbound)
        self._streams[slot] = stream
        stream.start()
        if claim.purpose == Purpose.SERVICE and self.link is not None:
            self._ping()
        self._announce()
        return None

    def _announce(self) -> None:
        if self.up and not self._announced:
            self._announced = True
            self._watcher.peer_up(self)

    # --- clock

    def _ping(self) -> None:
        service = self._service
        if service is not None:
            service.ping()

    def ping_answered(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        self.clock.add(sent, remote_received, remote_sent, received)
        if self.clock.count < FIRST_PINGS and not self._announced:
            self._ping()
        else:
            self._loop.call_later(PING_EVERY_S, self._ping)
        self._announce()

    def delay(self, remote_sent: float, received: float) -> float:
        return self.clock.delay(remote_sent, received)

    # --- control

    @property
    def _service(self) -> ServiceStream | None:
        stream = self._streams.get((Purpose.SERVICE, 0))
        return stream if isinstance(stream, ServiceStream) else None

    @property
    def control_backlog(self) -> int:
        service = self._service
        return service.unsent if service is not None else 0

    def send_control(self, data: bytes) -> None:
        service = self._service
        if service is not None:
            service.send_control(data)

    def control(self, message: dict[str, Any]) -> None:
        self._watcher.peer_control(self, message)

    # --- streams go

    def heard_goodbye(self, stream: Stream) -> None:
        first, self.departed = not self.departed, True
        if self.link is not None:
            if isinstance(stream, DataStream):
                stream.inbound.abort(_LEFT)
            for lane in self.link.send_lanes():
                lane.abort(_LEFT)
        if first:
            log.info("left: %s has ended and closed its connections", self.info)
            self._watcher.peer_gone(self, _LEFT, expected=True)

    def ended(self, stream: Stream, reason: str) -> None:
        if stream.closed:
            return
        if self._closing:
            # the other end may be closing as well and still read: what waits is sent first, unless that is impossible
            if stream.finished_writing or not stream.at_end or "broke" in reason:
                self._drop(stream)
            return
        # a goodbye, or messages, may have arrived on other streams before this one broke
        for other in self.streams:
            other.drain()
        if self.departed:
            if isinstance(stream, DataStream):
                stream.inbound.abort(_LEFT)
            stream.close()
        else:
            self.lose(Loss(PeerLostError, reason, _LOOK))

    def malformed(self, stream: Stream, error: MalformedFrame) -> None:
        self.lose(
            Loss(
                TransportError,
                f"it sent a malformed frame on connection {stream.name}: {error}",
                "Install the same release of adaptra_plugin on all ranks; if it is, the network corrupts data.",
            )
        )

    def lose(self, loss: Loss) -> None:
        """The link is unusable from now on. What has arrived stays readable."""
        if self.loss is not None or self._closing:
            return
        self.loss = loss
        for stream in self.streams:
            stream.close()
        if self.link is not None:
            self.link.abort(loss)
        log.error("lost: %s: %s", self.info, loss.reason)
        self._watcher.peer_gone(self, loss, expected=False)

    # --- the end

    def begin_close(self) -> None:
        self._closing = True
        for stream in self.streams:
            stream.begin_close()

    def finished(self, stream: Stream) -> None:
        if stream.at_end:
            self._drop(stream)
        else:
            self._watcher.peer_closed(self)

    def _drop(self, stream: Stream) -> None:
        stream.close()
        self._watcher.peer_closed(self)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
