"""The reliable protocol to one peer, over however many rails there are.

A rail carries frames in order and loses none until it fails. So each end numbers what it sends over a rail, and the other
one says up to which number it has come, with whatever goes its way. What was under way on a rail that fails, or owes an
answer for too long, goes again over another one, and the receiver recognises by position what it has. Everything arrives
once, whatever a rail damages, holds up or takes with it. No I/O here: rails take frames, and the link is told the time.
"""

from __future__ import annotations

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptra_plugin.transport.proxy.arrivals import Arrivals
from adaptra_plugin.transport.proxy.control import Ordered, Untaken, checksum_of, parse_object, positions
from adaptra_plugin.transport.proxy.events import LaneKey, LinkEvents, Rings
from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.loop import Clockwork
from adaptra_plugin.transport.proxy.outbox import Item, Outbox
from adaptra_plugin.transport.proxy.rail_connection import ACK_STATE_S, MAX_WINDOW, RailConnection, Sent, seal
from adaptra_plugin.transport.proxy.rails.base import Rail
from adaptra_plugin.transport.proxy.room import FreeRoom
from adaptra_plugin.transport.proxy.silence import Silence
from adaptra_plugin.transport.proxy.striping import Striping
from adaptra_plugin.transport.proxy.wire import (
    TIMES,
    Flag,
    FrameHeader,
    FrameKind,
    MalformedFrame,
)
from adaptra_plugin.transport.types import Direction

MOST_REFUSED = 8
"""Frames that may come damaged in a row, before a rail is left if there is another one."""
ANSWERS_BACKLOG = 2 * MAX_WINDOW
"""A peer that reads nothing gets no more answers beyond so many waiting bytes: they must not fill this process."""


class Link:
    """See the module. `lanes`: memory per direction and lane; none towards a peer that is no neighbour.

    Args:
        lanes: rings per direction and lane, both ends the same.
        loop: tells the time, and wakes up the owner, who calls `flush` after each turn.
        limit: longest message (bytes).
        segment_bytes: size of the pieces.
        checksum: per kind of rail, whether segments carry one.
    """

    def __init__(
        self,
        lanes: Mapping[LaneKey, Rings],
        events: LinkEvents,
        loop: Clockwork,
        *,
        limit: int,
        segment_bytes: int,
        checksum: Callable[[Rail], bool],
    ) -> None:
        self.limit = limit
        self.lanes = max(1, len(lanes) // 2)
        self.health: dict[str, Health] = {}
        self.retries = 0
        self.connections: dict[str, RailConnection] = {}
        self._events = events
        self._loop = loop
        self._checksum = checksum
        self._rings = dict(lanes)
        self._outbox = Outbox(len(lanes) // 2, segment_bytes)
        self._arrivals = Arrivals(lanes, events, loop, self.connections, self.health, limit)
        self._urgent: deque[Item] = deque()
        self._unacked_state = 0
        self._free = FreeRoom(rings.receive_ring.capacity for rings in lanes.values())
        self.untaken = Untaken()
        self._control_in = Ordered()
        self._striping = Striping(self.connections, self.health)
        self._silence = Silence(self, events, loop)
        self._known: dict[str, tuple[float, float, float]] = {}  # of a rail's last connection: speed, trip, patience
        self._connection_count = 0
        self._stuck_out: dict[LaneKey, int] = {}
        self._stuck_in: dict[LaneKey, int] = {}
        self._stuck: set[LaneKey] = set()  # lanes whose producer at the other end waits for room
        self._saying_goodbye = False
        self._goodbye: Item | None = None
        self._closed = False
        self._wakes_at = math.inf

    # --- rails

    def add_rail(self, rail: Rail, *, ready: bool = True) -> None:
        """A connection that stands. The rail of that name must not be there any more."""
        assert rail.name not in self.connections
        self._connection_count += 1
        connection = self.connections[rail.name] = RailConnection(rail, ready, self._connection_count)
        if rail.name in self._known:
            connection.speed, connection.round_trip, connection.patience_factor = self._known[rail.name]
        health = self.health.setdefault(rail.name, Health())
        if health.answered(self._loop.clock()):
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
        connection = self._of(rail)
        if connection is None:
            return
        del self.connections[rail.name]
        # one that did not answer in time may only have become slow: be more patient with its next connection
        patience = min(2 * connection.patience_factor, 16.0) if connection.silent_since is not None else 1.0
        self._known[rail.name] = (connection.speed, connection.best_trip, patience)
        health = self.health[rail.name]
        health.failed(self._loop.clock())
        self.again(connection.take_all())
        # on every rail, in front of what goes again: the peer lets go of its end
        note = json.dumps({"closed": rail.name, "ours": connection.ours, "yours": connection.theirs}).encode()
        for other in self.connections.values():
            other.tell(FrameHeader(FrameKind.RAIL), note)
        self._events.rail_state(rail, health.state, reason)
        self._events.rail_lost(rail, reason)
        self.pump()

    def _of(self, rail: Rail) -> RailConnection | None:
        """None: the rail is not in use any more."""
        connection = self.connections.get(rail.name)
        return connection if connection is not None and connection.rail is rail else None

    # --- commands

    def send(self, direction: Direction, lane: int, message: int, total: int, sent: float, after: int) -> None:
        """A message lies in the ring (`after`: 1 + position, 0: none); `pump` follows."""
        self._outbox.add(direction, lane, message, total, sent, after)

    def release(self, direction: Direction, lane: int, message: int) -> None:
        """A received message has been copied out; `pump` follows."""
        if nbytes := self._arrivals.inboxes[direction, lane].release(message):
            self._free.add(direction, lane, message, nbytes, self._loop.clock())

    def stuck(self, direction: Direction, lane: int, stuck: bool) -> None:
        """A producer waits for room, or no longer."""
        number = self._stuck_out[direction, lane] = self._stuck_out.get((direction, lane), 0) + 1
        self._say(Item(FrameKind.STUCK, 0, number=number, total=int(stuck), direction=direction, lane=lane))

    def send_control(self, data: bytes) -> None:
        """JSON bytes for the other endpoint."""
        self._say(Item(FrameKind.CONTROL, len(data), body=data, number=self.untaken.add(len(data))))
        self.pump()

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
        for name in self.connections:
            self.ping(name)  # the answers bring the acknowledgements that have waited for something to go with
        self.pump()

    def close(self) -> None:
        self._closed = True
        for connection in self.connections.values():
            connection.rail.close()
        self.connections.clear()

    @property
    def corrupt(self) -> int:
        """Frames that have come damaged."""
        return self._arrivals.corrupt

    @property
    def unsent(self) -> int:
        """Messages and frames that have not arrived yet."""
        return self._unacked_state + self._outbox.unacked

    def _say(self, item: Item) -> None:
        self._unacked_state += 1
        self._urgent.append(item)

    # --- sending

    def pump(self) -> None:
        """Hands rails what they can take."""
        if self._closed:
            return
        if self._free and (self._outbox.waiting_bytes or self._stuck or self._saying_goodbye or self._free.much):
            self._say_free()
        while self._urgent and (connection := self._striping.for_small()) is not None:
            item = self._urgent.popleft()
            header = FrameHeader(item.kind, 0, 0, item.direction, item.lane, item.number, item.total)
            connection.submit(item, header, seal(header, item.body), self._loop.clock())
        while (segment := self._outbox.peek()) is not None:
            connection = self._striping.for_segment(segment, self._outbox.waiting_bytes)
            if connection is None:
                break
            self._submit_segment(connection, self._outbox.pop())
        if self._saying_goodbye and self._goodbye is None and not self.unsent:
            self._goodbye = Item(FrameKind.GOODBYE, 0)
            self._say(self._goodbye)
            self.pump()

    def _say_free(self) -> None:
        for item in self._free.take():
            self._say(item)

    def _submit_segment(self, connection: RailConnection, item: Item) -> None:
        found = item.outgoing
        assert found is not None
        header = self._outbox.header(item)
        body: Sequence[memoryview] = ()
        if connection.rail.by_reference:
            header.flags = Flag.REFERENCE
            header.at, header.length = 0, found.total
            for other in found.items:
                other.covered = True
        else:
            ring = self._rings[found.direction, found.lane].ring
            body = ring.slices(found.message + item.at, item.length)
            if self._checksum(connection.rail):
                header.flags = Flag.VERIFIED
                header.checksum = checksum_of(body)
        connection.submit(item, header, body, self._loop.clock())

    def again(self, frames: Sequence[Sent]) -> None:
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
        if (connection := self._of(rail)) is None:
            raise MalformedFrame(f"a segment came over {rail.name}, which is not in use any more")
        return self._arrivals.place(connection, header)

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        """Sink: a whole frame."""
        connection = self._of(rail)
        if connection is None or self._closed:
            return
        kind = header.kind
        if header.sequence:
            connection.take(header, self._loop.clock())
            if kind is FrameKind.SEGMENT:
                self._arrivals.take(connection, header)
            elif self._arrivals.sound(connection, header, body):
                self._state(connection, header, body)
        elif kind is not FrameKind.ACK and self._arrivals.sound(connection, header, body):
            self._answer(connection, header, body)
        # after what the frame says: that a message is consumed says more than that it has arrived, and what has come damaged
        # counts as arrived
        if header.ack > connection.acked and self._of(rail) is connection:
            self._acknowledged(connection, header.ack)

    def _answer(self, connection: RailConnection, header: FrameHeader, body: bytes) -> None:
        """A frame without a number."""
        kind, now = header.kind, self._loop.clock()
        if kind is FrameKind.PING:
            connection.theirs = header.message
            if connection.rail.backlog <= ANSWERS_BACKLOG:
                connection.tell(FrameHeader(FrameKind.PONG, sent=now), TIMES.pack(header.sent, now))
        elif kind is FrameKind.PONG and len(body) == TIMES.size:
            sent, remote_received = TIMES.unpack(body)
            if not (math.isfinite(sent) and math.isfinite(remote_received)):
                raise MalformedFrame(f"a pong has the times {sent} and {remote_received}")
            connection.ponged(sent, now)
            if not connection.overdue(now):
                self._well(connection)
            self._events.pong(sent, remote_received, header.sent, now)
        elif kind is FrameKind.NACK:
            if connection.rail.backlog > ANSWERS_BACKLOG:
                raise MalformedFrame(
                    f"frame {header.message} is asked for again, and more waits than is ever under way"
                )
            if (refused := connection.refused(header.message)) is not None:
                if connection.refusals >= MOST_REFUSED:
                    self._loop.post(functools.partial(self._leave_damaging, connection))
                self.again([refused])
                self.pump()
        elif kind is FrameKind.RAIL:
            self._note(connection.rail, parse_object(body))
        else:
            raise MalformedFrame(f"a {kind.name.lower()} frame of {header.length} bytes has no number")

    def _leave_damaging(self, connection: RailConnection) -> None:
        """What it carries comes damaged again and again, while it answers in time: others do better."""
        name = connection.rail.name
        others = (other for other in self.connections.values() if other is not connection and other.ready)
        if self.connections.get(name) is connection and any(
            self.health[other.rail.name].state is State.HEALTHY for other in others
        ):
            self.drop_rail(name, f"it has damaged {connection.refusals} frames in a row")

    def _note(self, rail: Rail, message: dict[str, Any]) -> None:
        """The peer speaks of rails. A connection that it has closed may have been replaced meanwhile."""
        if isinstance(name := message.get("closed"), str):
            connection, ours = self.connections.get(name), message.get("ours")
            if connection is None or (
                message.get("yours") != connection.ours and (not ours or ours != connection.theirs)
            ):
                return
        self._events.rail_message(rail, message)

    def _state(self, connection: RailConnection, header: FrameHeader, body: bytes) -> None:
        kind = header.kind
        if kind is FrameKind.CONSUMED:
            self._consumed((header.direction, header.lane), header.message)
            for entry in positions(body, self._rings):
                self._consumed(*entry)
        elif kind is FrameKind.STUCK:
            key = (header.direction, header.lane)
            if header.message > self._stuck_in.get(key, 0):
                self._stuck_in[key] = header.message
                (self._stuck.add if header.total else self._stuck.discard)(key)
                self._events.peer_stuck(*key, bool(header.total))
                self.pump()
        elif kind is FrameKind.CONTROL:
            for message in self._control_in.take(header.message, body):
                self._events.control(message)
        elif kind is FrameKind.RAIL:
            self._note(connection.rail, parse_object(body))
        elif kind is FrameKind.TAKEN:
            self.untaken.taken(header.message)
        elif kind is FrameKind.GOODBYE:
            connection.tell(FrameHeader(FrameKind.ACK))  # this end may be about to close the rail
            self._events.goodbye()
        else:
            raise MalformedFrame(f"a {kind.name.lower()} frame came with a number")

    def _consumed(self, key: LaneKey, message: int) -> None:
        if key not in self._rings:
            raise MalformedFrame(
                f"a message of lane {key[1]}, direction {int(key[0])} is consumed: there is no such lane"
            )
        if (found := self._outbox.consumed(*key, message)) is not None:
            self._outbox.whole(found)
            self._events.consumed(*key, message)

    def _acknowledged(self, connection: RailConnection, number: int) -> None:
        arrived = connection.acknowledged(number, self._loop.clock())
        self._well(connection)  # first: what has arrived may have been the last thing that this link had to say
        for sent in arrived:
            item = sent.item
            if item.done:
                continue
            if item.outgoing is not None:
                found = self._outbox.whole(item.outgoing) if sent.reference else self._outbox.acked(item)
                if found is not None:
                    self._events.acked(found.direction, found.lane, found.message)
                continue
            item.done = True
            self._unacked_state -= 1
            if item is self._goodbye:
                self._events.finished()
        self.pump()

    def _well(self, connection: RailConnection) -> None:
        health = self.health[connection.rail.name]
        if health.state is not State.HEALTHY:
            health.answered(self._loop.clock())
            self._events.rail_state(connection.rail, health.state, "it answers again")
            # what it answers to has waited: clocks are compared anew, should its host's have stood still
            self.ping(connection.rail.name)
            self.pump()

    # --- time

    def flush(self) -> None:
        """At the end of the loop's turn: what it has caused leaves together, and what has come is acknowledged in time."""
        wake = self._free.by
        if wake < math.inf and wake <= self._loop.clock():
            wake = math.inf
            self._say_free()
            self.pump()
        for connection in self.connections.values():
            if connection.ack_by < math.inf:
                now = self._loop.clock()
                if connection.ack_by <= now:
                    if connection.rail.backlog <= ANSWERS_BACKLOG:
                        connection.tell(FrameHeader(FrameKind.ACK))
                    else:
                        connection.ack_by = now + ACK_STATE_S
                wake = min(wake, connection.ack_by)
            connection.rail.flush()
        if wake < self._wakes_at:
            self._wakes_at = wake
            self._loop.call_at(wake, self._woken)

    def _woken(self) -> None:
        self._wakes_at = math.inf  # the turn ends with `flush`

    def tick(self) -> None:
        """Looks for what is overdue; to be called every `silence.TICK_S` while something is under way."""
        self._silence.look()

    def ping(self, name: str) -> None:
        """Asks for a sign of life, and compares clocks, if the rail is there."""
        if (connection := self.connections.get(name)) is not None:
            self._silence.ask(connection)
