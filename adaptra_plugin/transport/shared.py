"""What the lanes of an endpoint share, and count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport.event_pump import EventPump
from adaptra_plugin.transport.slabs import Slabs
from adaptra_plugin.transport.staging import Copier
from adaptra_plugin.transport.works import Fate

if TYPE_CHECKING:
    from adaptra_plugin.transport.lanes import RecvLane


@dataclass(slots=True)
class Counters:
    messages: int = 0
    bytes: int = 0
    blocked_ms: float = 0.0
    full: int = 0  # how often the ring was full
    drained_early: int = 0  # messages that a blocked send took out of this receive ring


@dataclass(frozen=True)
class Shared:
    """What all lanes of an endpoint share. `clock`: the endpoint's (s). `drainer`: of all lanes together, in a ring of ranks."""

    config: TransportConfig
    fate: Fate
    pump: EventPump
    slabs: Slabs
    copier: Copier
    clock: Callable[[], float] = time.monotonic
    drainer: BackpressureDrainer | None = None


class BackpressureDrainer:
    """What a thread that waits does meanwhile, without any lock, so that peers can go on: it moves messages out of lanes whose
    producer waits for room, into the works posted for them. See `Channel.send`."""

    def __init__(self) -> None:
        self._lanes: list[RecvLane] = []

    def add(self, lanes: Iterable[RecvLane]) -> None:
        self._lanes.extend(lanes)

    def possible(self) -> bool:
        return any(lane.can_drain_early() for lane in self._lanes)

    def drain_one(self) -> bool:
        """Caller: moves one message; False if there is nothing to do."""
        return any(lane.drain_early() for lane in self._lanes)
