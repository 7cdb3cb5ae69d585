"""The records of one rank, as lines of its JSONL file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.jsonl import JsonlWriter
from adaptra_plugin.report.sink import Place, Sink


class JsonlSink(Sink):
    """Every record has `type`, `time` (seconds since the epoch), `rank` and `run`; `iteration` and `pipeline` hold the
    metrics as given, `event` the fields of a `StragglerEvent`, any other type those of `message`."""

    def __init__(self, place: Place, directory: str) -> None:
        self._marks = {"rank": place.rank, "run": place.run}
        self._clock = place.clock
        self._writer = JsonlWriter(
            directory,
            place.rank,
            place.run,
            max_file_mib=place.config.max_file_mib,
            queue_records=place.config.queue_records,
            clock=place.clock,
            logger=place.logger,
        )

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        self.message("iteration", metrics)

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self.message("pipeline", metrics)

    def event(self, event: StragglerEvent) -> None:
        self.message("event", {**event.to_json(), "text": event.sentence()})

    def message(self, kind: str, fields: Mapping[str, Any]) -> None:
        header = {"type": kind, "time": self._clock(), **self._marks}
        self._writer.write({**header, **fields, **header})  # first in the line, and not to be overwritten

    def close(self, deadline_s: float) -> bool:
        return self._writer.close(deadline_s)

    def files(self) -> list[str]:
        return [str(path) for path in self._writer.files()]
