"""Segments that arrive over the rails of a link: each lands once, whole, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping

from adaptra_plugin.transport.proxy.control import checksum_of
from adaptra_plugin.transport.proxy.events import LaneKey, LinkEvents, Rings
from adaptra_plugin.transport.proxy.health import Health
from adaptra_plugin.transport.proxy.inbox import LaneInbox
from adaptra_plugin.transport.proxy.loop import Clockwork
from adaptra_plugin.transport.proxy.rail_connection import RailConnection
from adaptra_plugin.transport.proxy.wire import Flag, FrameHeader, FrameKind, MalformedFrame

_TOLD_EVERY_S = 1.0


class Arrivals:
    """`connections` and `health` are kept up by the link."""

    def __init__(
        self,
        lanes: Mapping[LaneKey, Rings],
        events: LinkEvents,
        loop: Clockwork,
        connections: Mapping[str, RailConnection],
        health: Mapping[str, Health],
        limit: int,
    ) -> None:
        self.inboxes = {key: LaneInbox(rings.receive_ring, limit) for key, rings in lanes.items()}
        self.corrupt = 0
        self._events = events
        self._loop = loop
        self._connections = connections
        self._health = health
        self._untold, self._told_at = 0, float("-inf")

    def _inbox(self, header: FrameHeader) -> LaneInbox:
        inbox = self.inboxes.get((header.direction, header.lane))
        if inbox is None:
            raise MalformedFrame("a segment came from a peer that is no neighbour")
        return inbox

    def place(self, connection: RailConnection, header: FrameHeader) -> list[memoryview] | None:
        """Where the body of a segment goes; None: it has come before. Raises MalformedFrame."""
        connection.expect(header)
        inbox = self._inbox(header)
        windows = inbox.place(header)
        if windows is not None:
            self._let_go(inbox, header)
            connection.placed = header
        return windows

    def take(self, connection: RailConnection, header: FrameHeader) -> None:
        """All of a segment has come. It is asked for again if it was damaged, or thrown away because another rail was about
        to bring it. Raises MalformedFrame."""
        inbox = self._inbox(header)
        placed, connection.placed = connection.placed, None
        if header.flags & Flag.REFERENCE:
            if not connection.rail.by_reference:
                raise MalformedFrame(
                    f"a reference came over {connection.rail.name}: nobody has mapped what it points to"
                )
            ready = inbox.referenced(header)
            self._let_go(inbox, header)
        elif placed is None:
            if not inbox.has(header):
                self._refuse(connection, header)
            return
        else:
            if header.flags & Flag.VERIFIED:
                found = checksum_of(inbox.receive_ring.slices(header.message + header.at, header.length))
                if found != header.checksum:
                    self._damaged(connection, header)
                    return
            ready = inbox.filled(header)
        for message in ready:
            self._events.message(header.direction, header.lane, message)

    def _let_go(self, inbox: LaneInbox, header: FrameHeader) -> None:
        """Rails that are in the middle of the same bytes throw away the rest: one writes at a time, and none to what may be
        read."""
        for connection in self._connections.values():
            other = connection.placed
            if (
                other is not None
                and other.message == header.message
                and self.inboxes[other.direction, other.lane] is inbox
                and (other.at == header.at or inbox.has(other))
            ):
                connection.rail.discard()
                connection.placed = None

    def sound(self, connection: RailConnection, header: FrameHeader, body: bytes) -> bool:
        """Whether the body of a frame that is no segment is what was sent. If not, and it has a number, it is asked for
        again."""
        if body and not (header.flags & Flag.VERIFIED and checksum_of([body]) == header.checksum):
            self._damaged(connection, header)
            return False
        return True

    @staticmethod
    def _refuse(connection: RailConnection, header: FrameHeader) -> None:
        connection.tell(FrameHeader(FrameKind.NACK, message=header.sequence))

    def _damaged(self, connection: RailConnection, header: FrameHeader) -> None:
        if header.sequence:
            self._refuse(connection, header)  # first: whatever else leaves acknowledges the number
        self.corrupt += 1
        self._untold += 1
        now = self._loop.clock()
        if now - self._told_at >= _TOLD_EVERY_S:  # a bad cable must not flood the report
            self._told_at, count, self._untold = now, self._untold, 0
            state = self._health[connection.rail.name].state
            self._events.rail_state(connection.rail, state, f"{count} frames arrived damaged")
