"""The reliable protocol to one peer, over however many rails there are.

Every segment and every frame of state is acknowledged by the rail it came over. What is not acknowledged in time, or was
under way on a rail that failed, goes again, over another rail if there is one; the receiver recognises what it has. So
everything arrives once, whatever a rail loses, doubles, reorders or takes with it. No I/O here: rails take frames, and
the link is told the time.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptra_plugin.transport.proxy.control import Ordered, Untaken, checksum_of, parse_object, positions
from adaptra_plugin.transport.proxy.events import LaneKey, LinkEvents, Rings
from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.inbox import LaneInbox
from adaptra_plugin.transport.proxy.outbox import Item, Outbox
from adaptra_plugin.transport.proxy.rail_connection import MAX_WINDOW, MOST_PATIENCE, RailConnection, Sent
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail
from adaptra_plugin.transport.proxy.striping import Striping
from adaptra_plugin.transport.proxy.wire import (
    MAX_BODY_BYTES,
    POSITIONS,
    TIMES,
    Flag,
    FrameHeader,
    FrameKind,
    MalformedFrame,
)
from adaptra_plugin.transport.types import Direction

TICK_S = 0.05
"""How often `tick` has to be called while something is under way."""
PING_EVERY_S = 2.0
LATE_PING_EVERY_S = 0.5
"""A rail that is late is asked again at first with every tick, and then more and more seldom, down to this."""
DEAD_AFTER_S = 0.7
"""A rail that is silent for so long, while another one works, is closed and tried anew."""
ACK_EVERY = 4
"""Frames after which an acknowledgement goes without waiting for the end of the loop's turn."""
ANSWERS_BACKLOG = 2 * MAX_WINDOW
"""A peer that reads nothing gets no more answers beyond so many waiting bytes: they must not fill this process."""


class Link:
    """See the module. `lanes`: memory per direction and lane; none towards a peer that is no neighbour.

    Args:
        lanes: rings per direction and lane, both ends the same.
        limit: longest message (bytes).
        segment_bytes: size of the pieces.
        checksum: per kind of rail, whether segments carry one.
        clock: seconds.
    """

    def __init__(
        self,
        lanes: Mapping[LaneKey, Rings],
        events: LinkEvents,
        clock: Callable[[], float],
        *,
        limit: int,
        segment_bytes: int,
        checksum: Callable[[Rail], bool],
    ) -> None:
        self.limit = limit
        self.lanes = max(1, len(lanes) // 2)
        self.health: dict[str, Health] = {}
        self.retries = 0
        self.corrupt = 0
        self._untold, self._told_damage = 0, float("-inf")
        self.connections: dict[str, RailConnection] = {}
        self._events = events
        self._clock = clock
        self._checksum = checksum
        self._rings = dict(lanes)
        self._outbox = Outbox(len(lanes) // 2, segment_bytes)
        self._inboxes = {key: LaneInbox(rings.receive_ring, limit) for key, rings in lanes.items()}
        self._urgent: deque[Item] = deque()
        self._unacked_state = 0
        self._free: list[bytes] = []  # CONSUMED entries of this turn
        self.untaken = Untaken()
        self._control_in = Ordered()
        self._striping = Striping(self.connections, self.health)
        self._known: dict[str, tuple[float, float, float]] = {}  # of a rail's last connection: speed, trip, patience
        self._connection_count = 0
        self._stuck_out: dict[LaneKey, int] = {}
        self._stuck_in: dict[LaneKey, int] = {}
        self._saying_goodbye = False
        self._goodbye: Item | None = None
        self._closed = False
        self._pinged_at = float("-inf")

    # --- rails

    def add_rail(self, rail: Rail, *, ready: bool = True) -> None:
        """A connection that stands. The rail of that name must not be there any more."""
        assert rail.name not in self.connections
        self._connection_count += 1
        connection = self.connections[rail.name] = RailConnection(rail, ready, self._connection_count)
        if rail.name in self._known:
            connection.speed, connection.round_trip, connection.patience_factor = self._known[rail.name]
        health = self.health.setdefault(rail.name, Health())
        if health.answered(self._clock()):
            self._events.rail_state(rail, health.state, "connected")
        self.pump()

    def make_ready(self, name: str) -> None:
        """The peer has mapped this rank's rings: data may go by reference."""
        if (connection := self.connections.get(name)) is not None:
            connection.ready = True
            self.pump()

    def drop_rail(self, name: str, reason: str) -> None:
        """Closes a rail of our own accord, or because the peer has closed its end."""
        if (connection := self.connections.get(name)) is not None:
            connection.rail.close()
            self.failed(connection.rail, reason)

    def failed(self, rail: Rail, reason: str) -> None:
        """Sink: the rail is gone."""
        connection = self.connections.get(rail.name)
        if connection is None or connection.rail is not rail:
            return
        del self.connections[rail.name]
        # one that did not answer in time may only have become slow: be more patient with its next connection
        patience = min(2 * connection.patience_factor, 16.0) if connection.silent_since is not None else 1.0
        self._known[rail.name] = (connection.speed, connection.best_trip, patience)
        for header in list(connection.placed.values()):
            self._leave(connection, header)
        health = self.health[rail.name]
        health.failed(self._clock())
        self._again(connection.take_all())
        # on every rail, in front of what goes again: the peer lets go of its end, and of the room that it was filling
        note = json.dumps({"closed": rail.name, "ours": connection.ours, "yours": connection.theirs}).encode()
        for other in self.connections.values():
            other.tell(FrameHeader(FrameKind.RAIL), note)
        self._events.rail_state(rail, health.state, reason)
        self._events.rail_lost(rail, reason)
        self.pump()

    def drained(self, rail: Rail) -> None:
        """Sink: nothing to do; acknowledgements pace the link."""

    # --- commands

    def send(self, direction: Direction, lane: int, message: int, total: int, sent: float, after: int) -> None:
        """A message lies in the ring (`after`: 1 + position, 0: none); `pump` follows."""
        self._outbox.add(direction, lane, message, total, sent, after)

    def release(self, direction: Direction, lane: int, message: int) -> None:
        """A received message has been copied out; `pump` follows."""
        if self._inboxes[direction, lane].release(message) is not None:
            self._set_free(direction, lane, message)

    def _set_free(self, direction: Direction, lane: int, message: int) -> None:
        self._free.append(POSITIONS.pack(direction, lane, message))

    def stuck(self, direction: Direction, lane: int, stuck: bool) -> None:
        """A producer waits for room, or no longer."""
        number = self._stuck_out[direction, lane] = self._stuck_out.get((direction, lane), 0) + 1
        self._say(Item(FrameKind.STUCK, 0, number=number, total=int(stuck), direction=direction, lane=lane))

    def send_control(self, data: bytes) -> None:
        """JSON bytes for the other endpoint."""
        self._say(Item(FrameKind.CONTROL, len(data), body=data, number=self.untaken.add(len(data))))

    def control_taken(self) -> None:
        """The endpoint has taken the control messages that were handed to it."""
        if number := self._control_in.news():
            self._say(Item(FrameKind.TAKEN, 0, number=number))
            self.pump()

    def send_rail_message(self, message: dict[str, Any]) -> None:
        self._say(Item(FrameKind.RAIL, len(data := json.dumps(message).encode()), body=data))

    def say_goodbye(self) -> None:
        """Once everything has arrived."""
        self._saying_goodbye = True
        self.pump()

    def close(self) -> None:
        self._closed = True
        for connection in self.connections.values():
            connection.rail.close()
        self.connections.clear()

    @property
    def unsent(self) -> int:
        """Messages and frames that have not arrived yet."""
        return self._unacked_state + sum(
            not found.acked for lane in self._outbox.lanes.values() for found in lane.values()
        )

    def _say(self, item: Item) -> None:
        self._unacked_state += 1
        self._urgent.append(item)

    # --- sending

    def pump(self) -> None:
        """Hands rails what they can take."""
        if self._closed:
            return
        if self._free:
            step = MAX_BODY_BYTES // 64 // POSITIONS.size
            for start in range(0, len(self._free), step):
                body = b"".join(self._free[start : start + step])
                self._say(Item(FrameKind.CONSUMED, len(body), body=body))
            self._free.clear()
        while self._urgent and (connection := self._striping.for_small()) is not None:
            self._submit_state(connection, self._urgent.popleft())
        while (item := self._outbox.peek()) is not None:
            connection = self._striping.for_segment(item, self._outbox.waiting_bytes)
            if connection is None:
                break
            self._submit_segment(connection, self._outbox.pop())
        if self._saying_goodbye and self._goodbye is None and not self.unsent:
            self._goodbye = Item(FrameKind.GOODBYE, 0)
            self._say(self._goodbye)
            self.pump()

    def _submit_state(self, connection: RailConnection, item: Item) -> None:
        item.sends += 1
        header = FrameHeader(item.kind, direction=item.direction, lane=item.lane, message=item.number, total=item.total)
        header.sequence, header.behind = connection.number(item, self._clock())
        connection.tell(header, item.body)

    def _submit_segment(self, connection: RailConnection, item: Item) -> None:
        found = item.outgoing
        assert found is not None
        header = self._outbox.header(item)
        rings = self._rings[found.direction, found.lane]
        if connection.rail.by_reference:
            header.flags |= Flag.REFERENCE
            header.at, header.length = 0, found.total
            for other in found.items:
                other.covered = True
            header.sequence, header.behind = connection.number(item, self._clock(), reference=True)
            item.sends += 1
            connection.rail.submit(Frame(header))
            return
        body = rings.ring.slices(found.message + item.at, item.length)
        if self._checksum(connection.rail):
            header.flags |= Flag.VERIFIED
            header.checksum = checksum_of(body)
        header.sequence, header.behind = connection.number(item, self._clock())
        item.sends += 1
        connection.rail.submit(Frame(header, body))

    def _again(self, frames: Sequence[Sent]) -> None:
        """Frames that may not have arrived go again, in their order."""
        state = []
        for sent in reversed(frames):
            item = sent.item
            if item.done:
                continue
            self.retries += 1
            if item.outgoing is None:
                state.append(item)
            elif sent.reference:
                for other in reversed(item.outgoing.items):
                    self._outbox.again(other)
            else:
                self._outbox.again(item)
        self._urgent.extendleft(state)

    # --- receiving: the rails' sink

    def place(self, rail: Rail, header: FrameHeader) -> list[memoryview] | None:
        """Sink: where the body of a segment goes."""
        inbox = self._inboxes.get((header.direction, header.lane))
        connection = self.connections.get(rail.name)
        if inbox is None or connection is None or connection.rail is not rail or not header.sequence:
            raise MalformedFrame("a segment has no number, or came from a peer that is no neighbour")
        if header.sequence in connection.placed:
            return None  # the same frame twice
        windows = inbox.place(header)
        if windows is not None:
            connection.placed[header.sequence] = header
        return windows

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        """Sink: a whole frame."""
        connection = self.connections.get(rail.name)
        if connection is None or connection.rail is not rail or self._closed:
            return
        if body and not (header.flags & Flag.VERIFIED and checksum_of([memoryview(body)]) == header.checksum):
            self._damaged(connection)
            return
        if header.sequence:
            connection.ack_through(header.sequence - header.behind - 1)
        if header.kind == FrameKind.SEGMENT:
            if not self._segment(connection, header):
                return
            connection.came(header.sequence)
        elif header.sequence:
            if connection.came(header.sequence):
                self._state(rail, header, body)
        elif header.kind == FrameKind.ACK:
            self._acknowledged(connection, header, body)
        elif header.kind == FrameKind.PING:
            connection.theirs = header.message
            if rail.backlog > ANSWERS_BACKLOG:
                return
            answer = TIMES.pack(header.sent, self._clock())
            connection.tell(FrameHeader(FrameKind.PONG, sent=self._clock()), answer)
        elif header.kind == FrameKind.PONG and len(body) == TIMES.size:
            sent, remote_received = TIMES.unpack(body)
            if not (math.isfinite(sent) and math.isfinite(remote_received)):
                raise MalformedFrame(f"a pong has the times {sent} and {remote_received}")
            connection.ponged(sent, self._clock())
            if not connection.overdue(self._clock()):
                self._well(connection)
            self._events.pong(sent, remote_received, header.sent, self._clock())
        elif header.kind == FrameKind.RAIL:
            self._note(rail, parse_object(body))
        else:
            raise MalformedFrame(f"a {header.kind.name.lower()} frame of {header.length} bytes has no number")
        if connection.ack_due >= ACK_EVERY:
            self._acknowledge(connection)

    def _note(self, rail: Rail, message: dict[str, Any]) -> None:
        """The peer speaks of rails. A connection that it has closed may have been replaced meanwhile."""
        if isinstance(name := message.get("closed"), str):
            connection, ours = self.connections.get(name), message.get("ours")
            if connection is None or (
                message.get("yours") != connection.ours and (not ours or ours != connection.theirs)
            ):
                return
        self._events.rail_message(rail, message)

    def _damaged(self, connection: RailConnection) -> None:
        """It is not acknowledged, so it will come again."""
        self.corrupt += 1
        self._untold += 1
        if self._clock() - self._told_damage >= 1.0:  # a bad cable must not flood the report
            self._told_damage, count, self._untold = self._clock(), self._untold, 0
            self._events.rail_state(
                connection.rail, self.health[connection.rail.name].state, f"{count} frames arrived damaged"
            )

    def _segment(self, connection: RailConnection, header: FrameHeader) -> bool:
        """False if its bytes have not come, or are not what was sent: it will come again."""
        inbox = self._inboxes.get((header.direction, header.lane))
        if inbox is None or not header.sequence:
            raise MalformedFrame("a segment has no number, or came from a peer that is no neighbour")
        if header.flags & Flag.REFERENCE:
            if not connection.rail.by_reference:
                raise MalformedFrame(
                    f"a reference came over {connection.rail.name}: nobody has mapped what it points to"
                )
            ready = inbox.referenced(header)
        elif header.sequence not in connection.placed:
            return inbox.has(header)  # it was declined
        else:
            if header.flags & Flag.VERIFIED:
                found = checksum_of(inbox.receive_ring.slices(header.message + header.at, header.length))
                if found != header.checksum:
                    self._leave(connection, header)
                    self._damaged(connection)
                    return False
            del connection.placed[header.sequence]
            ready, freed = inbox.filled(header)
            if freed is not None:
                self._set_free(header.direction, header.lane, freed.message)
        self._discard(inbox, header)
        for message in ready:
            self._events.message(header.direction, header.lane, message)
        return True

    def _discard(self, inbox: LaneInbox, header: FrameHeader) -> None:
        """Other rails that are in the middle of these bytes stop writing: what is here is right, and may be read now."""
        found = inbox.messages.get(header.message)
        if found is None or not found.writing:
            return
        for connection in self.connections.values():
            for other in list(connection.placed.values()):
                here = self._inboxes[other.direction, other.lane] is inbox and other.message == header.message
                if here and inbox.has(other) and connection.rail.discard(other):
                    self._leave(connection, other)

    def _leave(self, connection: RailConnection, header: FrameHeader) -> None:
        """A segment that a rail was filling will not be completed."""
        del connection.placed[header.sequence]
        freed = self._inboxes[header.direction, header.lane].left(header)
        if freed is not None:
            self._set_free(header.direction, header.lane, freed.message)

    def _state(self, rail: Rail, header: FrameHeader, body: bytes) -> None:
        kind = header.kind
        if kind == FrameKind.CONSUMED:
            self._consumed(body)
        elif kind == FrameKind.STUCK:
            key = (header.direction, header.lane)
            if header.message > self._stuck_in.get(key, 0):
                self._stuck_in[key] = header.message
                self._events.peer_stuck(*key, bool(header.total))
        elif kind == FrameKind.CONTROL:
            for message in self._control_in.take(header.message, body):
                self._events.control(message)
        elif kind == FrameKind.RAIL:
            self._note(rail, parse_object(body))
        elif kind == FrameKind.TAKEN:
            self.untaken.taken(header.message)
        elif kind == FrameKind.GOODBYE:
            self._acknowledge(self.connections[rail.name])
            self._events.goodbye()
        else:
            raise MalformedFrame(f"a {kind.name.lower()} frame came with a number")

    def _consumed(self, body: bytes) -> None:
        for key, message in positions(body, self._inboxes):
            found = self._outbox.consumed(*key, message)
            if found is not None:
                if self._outbox.whole(found) is not None:  # the acknowledgement of its last segment was lost
                    self._events.acked(*key, message)
                self._events.consumed(*key, message)

    def _acknowledged(self, connection: RailConnection, header: FrameHeader, body: bytes) -> None:
        arrived, lost = connection.acknowledged(header.message, body, self._clock())
        if arrived:
            self._well(connection)
        for sent in arrived:
            item = sent.item
            if item.outgoing is not None:
                found = self._outbox.whole(item.outgoing) if sent.reference else self._outbox.acked(item)
                if found is not None:
                    self._events.acked(found.direction, found.lane, found.message)
                continue
            if item.done:
                continue
            item.done = True
            self._unacked_state -= 1
            if item is self._goodbye:
                self._events.finished()
        self._again(lost)
        if arrived or lost:
            self.pump()

    def _well(self, connection: RailConnection) -> None:
        health = self.health[connection.rail.name]
        if health.answered(self._clock()):
            self._events.rail_state(connection.rail, health.state, "it answers again")
            # what it answers to has waited: clocks are compared anew, should its host's have stood still
            self.ping(connection.rail.name)
            self.pump()

    def flush(self) -> None:
        """At the end of the loop's turn: acknowledges what has come, and pumps."""
        for connection in self.connections.values():
            if connection.ack_due:
                self._acknowledge(connection)
        if self._free:
            self.pump()

    def _acknowledge(self, connection: RailConnection) -> None:
        if connection.rail.backlog > ANSWERS_BACKLOG:
            return  # it stays due
        connection.tell(FrameHeader(FrameKind.ACK, message=connection.cumulative), connection.acknowledgement())

    # --- time

    def tick(self) -> None:
        """Looks for what is overdue."""
        now = self._clock()
        if now - self._pinged_at >= PING_EVERY_S:
            self._pinged_at = now
            for name in list(self.connections):
                self.ping(name)
        for connection in list(self.connections.values()):
            if connection.overdue(now):
                self._late(connection, now)

    def ping(self, name: str) -> None:
        """Asks for a sign of life, and compares clocks."""
        connection = self.connections[name]
        now = self._clock()
        connection.pinged = now if connection.pinged is None else connection.pinged
        connection.asked = now
        connection.tell(FrameHeader(FrameKind.PING, message=connection.ours, sent=now))

    def _late(self, connection: RailConnection, now: float) -> None:
        name, silent, busy = connection.rail.name, connection.silent_s(now), connection.rail.backlog > 0
        if self.health[name].late(now):
            self._events.rail_state(connection.rail, State.SUSPECT, f"no answer for {silent:.2f} s")
            for other in self.connections:  # those that answer prove that the peer is there
                self.ping(other)
        elif not busy and now - connection.asked >= min(LATE_PING_EVERY_S, silent / 4):
            self.ping(name)
        healthy = [
            other for other in self.connections.values() if other is not connection and self._striping.healthy(other)
        ]
        if healthy:
            steady = [other for other in healthy if self.health[other.rail.name].steady(now)]
            proof = [other.rail.name for other in steady if other.answered_at > now - silent]
            if proof and silent > max(DEAD_AFTER_S, connection.patience_s):
                self.drop_rail(name, f"no answer for {silent:.2f} s while {', '.join(proof)} work")
                return
            self._again(connection.take_all())
        else:
            # nothing better: again on the same rail, in case that it loses frames, more and more seldom
            if not busy and (frames := connection.take_all(now - connection.patience_s)):
                connection.patience_factor = min(2 * connection.patience_factor, MOST_PATIENCE)
                self._again(frames)
        self.pump()
