"""Rails that say nothing: who is asked, who counts as slow, and who as dead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from adaptra_plugin.transport.proxy.events import LinkEvents
from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.loop import Clockwork
from adaptra_plugin.transport.proxy.rail_connection import RailConnection, Sent
from adaptra_plugin.transport.proxy.wire import FrameHeader, FrameKind

TICK_S = 0.05
"""How often `Silence.look` has to be called while something is under way."""
PING_EVERY_S = 2.0
LATE_PING_EVERY_S = 0.5
"""A rail that is late is asked again at first with every tick, and then more and more seldom, down to this."""
DEAD_AFTER_S = 0.7
"""A rail that is silent for so long, while another one works, is closed and tried anew."""


class Watched(Protocol):
    """The link whose rails these are."""

    connections: dict[str, RailConnection]
    health: dict[str, Health]

    def drop_rail(self, name: str, reason: str) -> None: ...
    def again(self, frames: Sequence[Sent]) -> None: ...
    def ping(self, name: str) -> None: ...
    def pump(self) -> None: ...


class Silence:
    """Looks after the rails of one link."""

    def __init__(self, link: Watched, events: LinkEvents, loop: Clockwork) -> None:
        self._link = link
        self._events = events
        self._loop = loop
        self._all_asked_at = float("-inf")

    def look(self) -> None:
        """Looks for what is overdue."""
        now = self._loop.clock()
        if now - self._all_asked_at >= PING_EVERY_S:
            self._all_asked_at = now
            for name in list(self._link.connections):
                self._link.ping(name)
        for connection in list(self._link.connections.values()):
            if connection.overdue(now):
                self._late(connection, now)

    def ask(self, connection: RailConnection) -> None:
        """Pings."""
        now = self._loop.clock()
        connection.pinged = now if connection.pinged is None else connection.pinged
        connection.asked = now
        connection.tell(FrameHeader(FrameKind.PING, message=connection.ours, sent=now))

    def _late(self, connection: RailConnection, now: float) -> None:
        link = self._link
        name, silent = connection.rail.name, connection.silent_s(now)
        if link.health[name].late(now):
            self._events.rail_state(connection.rail, State.SUSPECT, f"no answer for {silent:.2f} s")
            for other in link.connections:  # those that answer prove that the peer is there
                link.ping(other)
        elif not connection.rail.backlog and now - connection.asked >= min(LATE_PING_EVERY_S, silent / 4):
            link.ping(name)
        others = [other for other in link.connections.values() if other is not connection]
        if any(link.health[other.rail.name].state is State.HEALTHY for other in others):
            steady = [other for other in others if link.health[other.rail.name].steady(now)]
            proof = [other.rail.name for other in steady if other.answered_at > now - silent]
            if proof and silent > max(DEAD_AFTER_S, connection.patience_s):
                link.drop_rail(name, f"no answer for {silent:.2f} s while {', '.join(proof)} work")
                return
            link.again(connection.take_all())
        # if there is nothing better it stays where it is: a rail that has not failed has lost nothing
        link.pump()
