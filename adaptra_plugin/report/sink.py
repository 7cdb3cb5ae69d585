"""What a place where news goes has to offer, and what it is built from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report.event import StragglerEvent

Send = Callable[[int, StragglerEvent | None, Mapping[str, Any] | None], object]
"""`(rank, event, metrics of the pipeline)`: brings one of them to `Reporter.show` of another rank; never blocks."""


class Sink(Protocol):
    """Takes news from many threads, the training thread too: returns at once, never raises. A subclass overrides what it cares about."""

    shared: bool = False
    """It shows what concerns all ranks: away from rank 0, it also gets what rank 0 sends."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one iteration of this rank; they are not changed afterwards."""
        return

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one iteration of the whole pipeline. Only rank 0 has them."""
        return

    def event(self, event: StragglerEvent) -> None:
        """Something that somebody should know about."""
        return

    def message(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Anything else worth keeping."""
        return

    def files(self) -> list[str]:
        """Paths of the files that it has written."""
        return []

    def close(self, deadline_s: float) -> bool:
        """Writes what is queued and ends. Returns whether that was done within `deadline_s`."""
        return True


@dataclass(frozen=True)
class Place:
    """The rank that a sink is built for."""

    config: ReportConfig
    rank: int
    """World rank."""
    run: str
    """Tells this run from others."""
    run_rank: int
    """World rank that owns the host's run, which is the one to feed with events and metrics of all."""
    overviews: bool
    """Rank 0 reports metrics of the whole pipeline."""
    send: Send
    clock: Callable[[], float]
    """Seconds since the epoch."""
    logger: logging.Logger
    """For lines that people read."""
    at_exit: Callable[[], object]
    """Ends the owner of the sinks at the exit of the process."""
