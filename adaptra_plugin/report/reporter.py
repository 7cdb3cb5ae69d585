"""One object that knows where news goes: the log, and every sink that the configuration asks for."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.remote import COORDINATOR, Receiver
from adaptra_plugin.report.sink import Place, Send
from adaptra_plugin.report.sinks import SINKS


def new_run(secret: bytes | None = None) -> str:
    """Eight digits that tell a run from others.

    Args:
        secret: of the job, known to all its ranks: so they agree. It cannot be found from the run. None: by chance.
    """
    return sha256(b"adaptra report run" + (secret or secrets.token_bytes(32))).hexdigest()[:8]


class Reporter:
    """Reports events and metrics of one rank. Nothing here blocks training or raises because a sink is broken."""

    def __init__(
        self,
        config: ReportConfig,
        rank: int,
        *,
        run_rank: int = COORDINATOR,
        overviews: bool = False,
        send: Send = lambda rank, event, metrics: None,
        run: str | None = None,
        clock: Callable[[], float] = time.time,
        logger: logging.Logger | None = None,
        at_exit: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            config: the `report` block.
            rank: world rank.
            run_rank: world rank that owns the host's run (of W&B, say).
            overviews: rank 0 reports metrics of the whole pipeline, which such a run gets in place of its rank's own.
            send: brings news to `show` of another rank.
            run: tells this run from others that write into the same directory; the same on all ranks. None: a new one.
            clock: seconds since the epoch.
            logger: for lines that people read; `adaptra` by default.
            at_exit: ends the owner of this reporter, and the reporter with it; called before W&B's own exit handler.
        """
        self._every = config.metrics_every
        self._logger = logger or logging.getLogger("adaptra")
        place = Place(
            config,
            rank,
            run=run or new_run(),
            run_rank=run_rank,
            overviews=overviews,
            send=send,
            clock=clock,
            logger=self._logger,
            at_exit=at_exit or self.close,
        )
        built = {name: build(place) for name, build in SINKS.items()}
        self._named = {name: sink for name, sink in built.items() if sink is not None}
        self._sinks = list(self._named.values())
        self._receiver = Receiver([sink for sink in self._sinks if sink.shared and rank != COORDINATOR])

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one iteration of this rank, every `metrics_every` iterations.

        Args:
            metrics: `iteration` (0-based) and any of numbers, texts, lists (one entry per stage) and mappings (one
                entry per link, say); times in ms. The values must not be changed afterwards.
        """
        if self._due(metrics):
            metrics = dict(metrics)  # the caller may use its own again
            for sink in self._sinks:
                sink.iteration(metrics)

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one iteration of the whole pipeline, from the one rank that knows them; as `iteration`."""
        if self._due(metrics):
            metrics = dict(metrics)
            for sink in self._sinks:
                sink.pipeline(metrics)

    def event(self, event: StragglerEvent) -> None:
        """Logs the event's sentence and tells the sinks."""
        self._logger.log(logging.INFO if event.state == "healed" else logging.WARNING, "%s", event.sentence())
        for sink in self._sinks:
            sink.event(event)

    def message(self, kind: str, text: str | None = None, *, level: int = logging.INFO, **fields: Any) -> None:
        """Anything else worth keeping.

        Args:
            kind: `type` of the record, such as `plan`, `ring_full`, `refused_connection`.
            text: a line for the log, and `text` of the record; None: only the record is written.
            level: of the line.
            fields: of the record.
        """
        if text is not None:
            self._logger.log(level, "%s", text)
            fields["text"] = text
        for sink in self._sinks:
            sink.message(kind, fields)

    def show(self, event: StragglerEvent | None, metrics: Mapping[str, Any] | None) -> None:
        """What rank 0 has sent for the sinks of this rank."""
        self._receiver.receive(event, metrics)

    def await_overview(self, last: int, give_up: Callable[[], bool], patience_s: float = 5.0) -> None:
        """Waits for the metrics of the pipeline of iteration `last`, which rank 0 sends, if a sink here gets them.

        Args:
            last: the last iteration of this rank.
            give_up: asked while it waits: whether nothing will come any more.
        """
        self._receiver.wait_for(last - last % self._every, give_up, patience_s)

    def files(self) -> list[str]:
        """Paths of the files that the sinks have written."""
        return [path for sink in self._sinks for path in sink.files()]

    def close(self, deadline_s: float = 10.0) -> None:
        """Writes what is queued and ends the threads; what takes longer than `deadline_s` in all is given up."""
        end = time.monotonic() + deadline_s
        for name, sink in self._named.items():
            if not sink.close(max(0.0, end - time.monotonic())):
                self._logger.warning("report: %s did not finish within %g s", name, deadline_s)

    def _due(self, metrics: Mapping[str, Any]) -> bool:
        return int(metrics.get("iteration", 0)) % self._every == 0
