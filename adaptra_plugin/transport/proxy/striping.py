"""Which rail carries what. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.outbox import Item
from adaptra_plugin.transport.proxy.rail_connection import RailConnection


class Striping:
    """Chooses among the connections and by the health of a link's rails, both by name and kept up by the link."""

    def __init__(self, connections: Mapping[str, RailConnection], health: Mapping[str, Health]) -> None:
        self._connections = connections
        self._health = health

    def healthy(self, connection: RailConnection) -> bool:
        return self._health[connection.rail.name].state is State.HEALTHY

    def for_small(self) -> RailConnection | None:
        """For frames of state: the best kind of rail that works, the shortest way."""
        return min(self._connections.values(), key=self._preference, default=None)

    def _preference(self, connection: RailConnection) -> tuple[bool, int, float]:
        return (not self.healthy(connection), connection.rail.kind, connection.inflight / connection.speed)

    def for_segment(self, item: Item, waiting_bytes: int) -> RailConnection | None:
        """The rail on which a segment arrives first; None: all that are worth it have enough to do.

        `waiting_bytes`: all that waits for a rail, the segment included."""
        connections = self._eligible()
        if not connections:
            return None
        if len(connections) == 1:
            return connections[0] if self._has_room(connections[0], item) else None
        fastest = min(connections, key=lambda connection: connection.finish_s(item.length))
        if self._has_room(fastest, item):
            return fastest
        # a slower rail only if the faster one, busy as it is, would finish all that waits later than it this segment
        until = fastest.finish_s(waiting_bytes)
        others = [t for t in connections if self._has_room(t, item) and t.finish_s(item.length) < until]
        return min(others, key=lambda connection: connection.finish_s(item.length), default=None)

    def _eligible(self) -> list[RailConnection]:
        """Rails for data: the healthy ones of the best kind; suspects only if there is nothing else."""
        usable = [connection for connection in self._connections.values() if connection.ready]
        healthy = [connection for connection in usable if self.healthy(connection)]
        chosen = healthy or usable
        best = min((connection.rail.kind for connection in chosen), default=None)
        return [connection for connection in chosen if connection.rail.kind is best]

    @staticmethod
    def _has_room(connection: RailConnection, item: Item) -> bool:
        return (
            connection.rail.by_reference
            or not connection.inflight
            or connection.inflight + item.length <= connection.window
        )
