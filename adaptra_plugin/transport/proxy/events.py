"""What a link tells its owner, and the memory that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.rails.base import Rail
from adaptra_plugin.transport.types import Direction

LaneKey = tuple[Direction, int]


class LinkEvents(Protocol):
    """Who hears what happens on a link."""

    def message(self, direction: Direction, lane: int, found: Incoming) -> None: ...
    def acked(self, direction: Direction, lane: int, message: int) -> None: ...
    def consumed(self, direction: Direction, lane: int, message: int) -> None:
        """It has arrived, whether that was reported or not, and has been copied out."""

    def peer_stuck(self, direction: Direction, lane: int, stuck: bool) -> None: ...
    def control(self, message: dict[str, Any]) -> None: ...
    def rail_message(self, rail: Rail, message: dict[str, Any]) -> None: ...
    def goodbye(self) -> None: ...
    def finished(self) -> None:
        """Our goodbye has arrived."""

    def pong(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None: ...
    def rail_state(self, rail: Rail, state: State, why: str) -> None: ...
    def rail_lost(self, rail: Rail, reason: str) -> None:
        """A rail has failed; what was under way on it is queued again."""


@dataclass(frozen=True)
class Rings:
    """The memory of one lane and direction."""

    ring: Memfd
    """What this rank fills."""
    receive_ring: Memfd
    """The image of what the peer fills."""
