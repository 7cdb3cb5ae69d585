"""Timelines: when every action and transfer ran. The simulator and real runs produce the same thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import CODE, Action, Kind

CAUSES = ("dependency", "link", "blocking")
"""Why a rank is idle: the input is not computed yet; it is on its way; it waits for the link to be free."""


class Span(NamedTuple):
    """One action of one rank, milliseconds since the start of the iteration."""

    rank: int
    action: Action
    start_ms: float
    end_ms: float


class Transfer(NamedTuple):
    """One transfer: ``action`` is what produced it; ready, on the link, arrived. Milliseconds."""

    src: int
    dst: int
    action: Action
    ready_ms: float
    start_ms: float
    end_ms: float


class Idle(NamedTuple):
    """A time in which a rank computed nothing, and why (one of CAUSES). Milliseconds."""

    rank: int
    start_ms: float
    end_ms: float
    cause: str


@dataclass(frozen=True)
class Timeline:
    """Spans per rank in order of time, transfers, and the critical path (empty where it is not known).

    Raises PlanError for spans that end before they start or overlap on one rank.
    """

    ranks: int
    spans: tuple[Span, ...]
    transfers: tuple[Transfer, ...] = ()
    critical_path: tuple[Action, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(sorted(self.spans, key=lambda s: (s.rank, s.start_ms, s.end_ms))))
        object.__setattr__(self, "transfers", tuple(self.transfers))
        for before, span in zip((None, *self.spans), self.spans, strict=False):
            if not 0 <= span.rank < self.ranks:
                raise PlanError(f"{span.action} ran on rank {span.rank}: the timeline has {self.ranks} ranks")
            if span.end_ms < span.start_ms:
                raise PlanError(f"{span.action} ends at {span.end_ms} ms, before it starts at {span.start_ms} ms")
            if before is not None and before.rank == span.rank and span.start_ms < before.end_ms - 1e-6:
                raise PlanError(
                    f"rank {span.rank}: {span.action} starts at {span.start_ms} ms, "
                    f"while {before.action} runs until {before.end_ms} ms"
                )

    @classmethod
    def from_spans(cls, spans: Iterable[Span], transfers: Iterable[Transfer] = ()) -> Timeline:
        """A real run: the earliest span starts at 0."""
        spans, transfers = list(spans), list(transfers)
        zero = min((s.start_ms for s in spans), default=0.0)
        return cls(
            1 + max((s.rank for s in spans), default=-1),
            tuple(s._replace(start_ms=s.start_ms - zero, end_ms=s.end_ms - zero) for s in spans),
            tuple(
                t._replace(ready_ms=t.ready_ms - zero, start_ms=t.start_ms - zero, end_ms=t.end_ms - zero)
                for t in transfers
            ),
        )

    @cached_property
    def makespan_ms(self) -> float:
        """End of the last action."""
        return max((span.end_ms for span in self.spans), default=0.0)

    @cached_property
    def idle(self) -> tuple[Idle, ...]:
        """Every idle time of every rank until the makespan, split by cause.

        A wait is *dependency* until its input is produced, *blocking* until the link takes it, *link* until it arrives.
        """
        arrivals = {
            (
                t.action.stage + (1 if t.action.kind is Kind.FORWARD else -1),
                t.action.kind is Kind.FORWARD,
                t.action.microbatch,
            ): t
            for t in self.transfers
        }
        out: list[Idle] = []
        by_rank: list[list[Span]] = [[] for _ in range(self.ranks)]
        for span in self.spans:
            by_rank[span.rank].append(span)
        for rank, spans in enumerate(by_rank):
            free = 0.0
            for span in spans:
                if span.start_ms > free:
                    moved = arrivals.get((span.action.stage, span.action.kind is Kind.FORWARD, span.action.microbatch))
                    if span.action.kind is Kind.BACKWARD_WEIGHT:
                        moved = None
                    out.extend(_split(rank, free, span.start_ms, moved))
                free = max(free, span.end_ms)
            if free < self.makespan_ms:
                out.append(Idle(rank, free, self.makespan_ms, "dependency"))
        return tuple(out)

    @cached_property
    def idle_ms(self) -> dict[str, float]:
        """Idle time by cause, summed over the ranks."""
        total = dict.fromkeys(CAUSES, 0.0)
        for idle in self.idle:
            total[idle.cause] += idle.end_ms - idle.start_ms
        return total

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most activations held at once: from the start of F to the end of W or B."""
        held, peak = [0] * self.ranks, [0] * self.ranks
        for span in self.spans:
            code = CODE[span.action.kind]
            held[span.rank] += (code == 0) - (code >= 2)
            peak[span.rank] = max(peak[span.rank], held[span.rank])
        return tuple(peak)

    def to_json(self) -> dict[str, Any]:
        """The output of ``adaptra simulate``."""
        return {
            "makespan_ms": self.makespan_ms,
            "idle_ms": self.idle_ms,
            "peak_activations": list(self.peak_activations),
            "critical_path": [str(action) for action in self.critical_path],
        }


def _split(rank: int, start: float, end: float, moved: Transfer | None) -> Iterable[Idle]:
    if moved is None:
        yield Idle(rank, start, end, "dependency")
        return
    bounds = (
        ("dependency", moved.ready_ms),
        ("blocking", moved.start_ms),
        ("link", moved.end_ms),
        ("dependency", end),
    )
    for cause, until in bounds:
        until = min(until, end)
        if until > start:
            yield Idle(rank, start, until, cause)
            start = until
