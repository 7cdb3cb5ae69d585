"""The sinks that exist: a builder each, which returns None where the configuration or the rank has no use for it."""

from __future__ import annotations

from collections.abc import Callable

from adaptra_plugin.report.jsonl_sink import JsonlSink
from adaptra_plugin.report.remote import COORDINATOR, Receiver, RemoteSink
from adaptra_plugin.report.sink import Place, Sink
from adaptra_plugin.report.wandb_sink import WandbSink


def _jsonl(place: Place) -> Sink | None:
    return None if place.config.directory is None else JsonlSink(place, place.config.directory)


def _wandb(place: Place) -> Sink | None:
    if place.config.wandb == "off":
        return None
    if place.rank == place.run_rank:
        sink = WandbSink(place.config, logger=place.logger, at_exit=place.at_exit, overviews=place.overviews)
        return sink if place.rank == COORDINATOR else Receiver(sink)
    return RemoteSink(place.run_rank, place.send) if place.rank == COORDINATOR else None


SINKS: dict[str, Callable[[Place], Sink | None]] = {"jsonl": _jsonl, "wandb": _wandb}
