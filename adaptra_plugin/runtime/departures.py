"""Ranks that leave while others go on: who left which schedule, why, and whether this rank is stuck without it.

A rank that leaves a schedule half-way says so at once, and one that ends says from which schedule on it takes no part;
the coordinator passes the news on to everybody. News alone end nothing: the others may leave the same schedule in the same way
(the end of the data, a hook that raises everywhere), or need nothing more of it. Only a rank that is found waiting in a
schedule that cannot be completed any more is lost with it.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import distributed

from adaptra_plugin.errors import TransportError
from adaptra_plugin.host import holds_collectives
from adaptra_plugin.transport import PeerInfo

STUCK_S = 0.5
"""A rank that waits in a transfer for so long after the news is stuck: what had been sent before has come by then."""
STUCK_ELSEWHERE_S = 5.0
"""... and one that is still in the schedule after so long, in a collective for one."""
_LOOK_S = 0.05
_MAX_WHY = 500
ENDED = "it has ended and closed its connections"

_COLLECTIVES = re.compile(r"torch/distributed/(distributed_c10d|c10d_logger|_functional_collectives)\.py")
_COLLECTIVE_TEXT = re.compile(r"gloo/|NCCL error|nccl\w+Error|RCCL error|ProcessGroup(NCCL|Gloo|UCC|MPI)|c10d::")


def is_foreign(error: BaseException) -> bool:
    """Whether an error may be the doing of another rank: of a transfer, or of a collective, or raised because of one. What
    the user's model, data or hooks raise is not."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, TransportError | distributed.DistError):
            return True
        if type(found) is RuntimeError and (_COLLECTIVE_TEXT.search(str(found)) or _in_collective(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def _in_collective(error: BaseException) -> bool:
    """Whether a collective of the host has raised it, by the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    return _COLLECTIVES.search(file) is not None or holds_collectives(file)


def reason(error: BaseException) -> str:
    """What became of a rank, in words."""
    if isinstance(error, StopIteration):
        return "it ran out of data (StopIteration) in the middle of an iteration"
    text = f": {error}" if str(error) else ""
    return f"it ended with {type(error).__name__}{text}"[:_MAX_WHY]


@dataclass(frozen=True)
class Departure:
    """`peer` has left schedule number `step_id`; `final`: and takes part in none after it. `broken`: by an error, so that what
    it has left cannot be of use to anybody."""

    peer: PeerInfo
    step_id: int
    final: bool
    broken: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        peer = self.peer
        return {
            "type": "departed",
            "rank": peer.rank,
            "pp_rank": peer.pp_rank,
            "host": peer.host,
            "step_id": self.step_id,
            "final": self.final,
            "broken": self.broken,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Departure:
        """Raises KeyError, TypeError, ValueError."""
        peer = PeerInfo(int(data["rank"]), int(data["pp_rank"]), str(data["host"]))
        return cls(peer, int(data["step_id"]), bool(data["final"]), bool(data["broken"]), str(data["why"]))

    def concerns(self, step_id: int) -> bool:
        return step_id == self.step_id or (self.final and step_id > self.step_id)


class Presence:
    """Where this rank is: in which schedule, and since when it waits there for another rank (s, `clock`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.step_id: int | None = None
        self.current = 1
        """Number of the schedule that this rank is in, or comes to next."""
        self.since = 0.0
        self.waiting_since: float | None = None

    def enter(self, step_id: int) -> None:
        self.since, self.current = self.clock(), step_id
        self.step_id = step_id

    def leave(self) -> None:
        if self.step_id is not None:
            self.current, self.step_id = self.step_id + 1, None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waiting_since = self.clock()
        try:
            yield
        finally:
            self.waiting_since = None


class Departures:
    """What is known of ranks that have left. Any thread.

    Args:
        presence: of this rank.
        rank: of this process.
        replica: which pipeline a rank is of; each counts its schedules for itself.
    """

    def __init__(self, presence: Presence, rank: int, replica: Callable[[int], int]) -> None:
        self._presence = presence
        self._own = replica(rank)
        self._replica = replica
        self._known: list[tuple[Departure, float]] = []
        self._lock = threading.Lock()

    def add(self, departure: Departure) -> bool:
        """False if nothing is new about it: another rank of its pipeline had left the same schedules before. Raises ValueError
        if there is no such rank."""
        replica = self._replica(departure.peer.rank)
        with self._lock:
            # what this rank has behind it concerns it no more
            self._known = [item for item in self._known if item[0].final or item[0].step_id >= self._presence.current]
            for known, _ in self._known:
                as_much = (known.final or not departure.final) and (known.broken or not departure.broken)
                if as_much and known.concerns(departure.step_id) and self._replica(known.peer.rank) == replica:
                    return False
            self._known.append((departure, self._presence.clock()))
            return True

    def ended(self, rank: int) -> bool:
        """Whether a rank has said that it takes part in nothing any more."""
        return any(departure.final and departure.peer.rank == rank for departure, _ in self._known)

    def blamed(self, step_id: int) -> Departure | None:
        """Who has left a schedule: the first one."""
        found = [departure for departure, _ in self._known if departure.concerns(step_id)]
        return min(found, key=lambda departure: departure.step_id, default=None)

    def cause(self, step_id: int) -> Departure | None:
        """Of whose departure the end of another rank may be a mere consequence."""
        found = self.blamed(step_id)
        return found if found is not None and (found.broken or self._is_related(found)) else None

    def _is_related(self, departure: Departure) -> bool:
        return self._replica(departure.peer.rank) == self._own

    def due(self) -> Departure | None:
        """The one without which this rank is stuck, now."""
        presence, step_id = self._presence, self._presence.step_id
        if step_id is None:
            return None
        now, waiting_since = presence.clock(), presence.waiting_since
        for departure, heard in sorted(self._known, key=lambda item: item[0].step_id):
            related = self._is_related(departure)
            if not departure.concerns(step_id) or not (related or departure.broken):
                continue
            if related and waiting_since is not None and now - max(heard, waiting_since) >= STUCK_S:
                return departure
            if now - max(heard, presence.since) >= STUCK_ELSEWHERE_S:
                return departure
        return None

    def watch(self, over: threading.Event, lose: Callable[[Departure], None]) -> None:
        """Looks until this rank is stuck, and calls `lose` then, once; or until `over`."""
        while not over.wait(_LOOK_S):
            if (departure := self.due()) is not None:
                lose(departure)
                return
