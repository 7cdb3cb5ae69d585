"""What the lanes of an endpoint share, and count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.transport.event_pump import EventPump
from adaptra_plugin.transport.slabs import Slabs
from adaptra_plugin.transport.staging import Copier
from adaptra_plugin.transport.types import Key


@dataclass(frozen=True, slots=True)
class Loss:
    """Why nothing more goes to, or comes from, a peer."""

    error: type[TransportError]
    reason: str
    remedy: str

    def about(self, key: Key, verb: str, peer: object, waited_s: float) -> TransportError:
        found = self.error(f"{key} cannot {verb} {peer}: {self.reason} (waited {waited_s:.1f} s). {self.remedy}")
        if isinstance(found, PeerLostError):
            found.peer = peer
        return found


class Fate:
    """The error that ended the whole endpoint, if any: every wait raises it, whatever else has happened."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


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


class Drainable(Protocol):
    """A lane whose producer may wait for room."""

    def can_drain_early(self) -> bool: ...

    def drain_early(self) -> bool: ...


class BackpressureDrainer:
    """What a thread that waits does meanwhile, without any lock, so that peers can go on: it moves messages out of lanes whose
    producer waits for room, into the works posted for them. See `Channel.send`."""

    def __init__(self) -> None:
        self._lanes: list[Drainable] = []

    def add(self, lanes: Iterable[Drainable]) -> None:
        self._lanes.extend(lanes)

    def possible(self) -> bool:
        return any(lane.can_drain_early() for lane in self._lanes)

    def drain_one(self) -> bool:
        """Caller: moves one message; False if there is nothing to do."""
        return any(lane.drain_early() for lane in self._lanes)
