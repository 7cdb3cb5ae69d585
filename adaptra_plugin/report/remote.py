"""From rank 0, which knows what concerns everybody, to the rank whose sink shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.sink import Sink

COORDINATOR = 0
"""World rank that sends."""


class RemoteSink(Sink):
    """On rank 0: forwards events and the pipeline's metrics to the rank `to`, where a `Receiver` takes them."""

    def __init__(self, to: int, send: Callable[[int, dict[str, Any]], object]) -> None:
        self._to = to
        self._send = send

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self._send(self._to, {"type": "show", "pipeline": metrics})

    def event(self, event: StragglerEvent) -> None:
        self._send(self._to, {"type": "show", "event": event.to_json()})


class Receiver(Sink):
    """On the other rank: a sink that also gets what rank 0 sends."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._shown = -1  # newest iteration of which the pipeline's metrics have come

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        self._sink.iteration(metrics)

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self._sink.pipeline(metrics)

    def event(self, event: StragglerEvent) -> None:
        self._sink.event(event)

    def close(self, deadline_s: float) -> bool:
        return self._sink.close(deadline_s)

    def receive(self, message: Mapping[str, Any]) -> None:
        """Takes a message of a `RemoteSink`. Raises ValueError or KeyError if it is none."""
        if "event" in message:
            self._sink.event(StragglerEvent.from_json(message["event"]))
            return
        metrics = message["pipeline"]
        iteration = metrics.get("iteration") if isinstance(metrics, Mapping) else None
        if isinstance(iteration, bool) or not isinstance(iteration, int):
            raise ValueError(f"pipeline: {metrics!r:.80} are not metrics of an iteration")
        self._sink.pipeline(metrics)
        self._shown = iteration

    def wait_for(self, iteration: int, give_up: Callable[[], bool], patience_s: float) -> None:
        """Returns when the metrics of the iteration have come, or there is no more point in waiting."""
        until = time.monotonic() + patience_s
        while self._shown < iteration and time.monotonic() < until and not give_up():
            time.sleep(0.01)
