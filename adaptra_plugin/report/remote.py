"""From rank 0, which knows what concerns everybody, to the rank whose sink shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.sink import Send, Sink

COORDINATOR = 0
"""World rank that collects, decides, and tells the others."""


class RemoteSink(Sink):
    """On rank 0: forwards events and the pipeline's metrics to the rank `to`, where a `Receiver` takes them."""

    def __init__(self, to: int, send: Send) -> None:
        self._to = to
        self._send = send

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self._send(self._to, None, metrics)

    def event(self, event: StragglerEvent) -> None:
        self._send(self._to, event, None)


class Receiver:
    """On the other rank: what rank 0 sends goes to the given sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._shown = -1  # newest iteration of which the pipeline's metrics have come

    def receive(self, event: StragglerEvent | None, metrics: Mapping[str, Any] | None) -> None:
        """Takes what a `RemoteSink` has sent."""
        for sink in self._sinks:
            if event is not None:
                sink.event(event)
            if metrics is not None:
                sink.pipeline(metrics)
        if metrics is not None:
            self._shown = metrics["iteration"]

    def wait_for(self, iteration: int, give_up: Callable[[], bool], patience_s: float) -> None:
        """Returns when the metrics of the iteration have come, or there is no more point in waiting."""
        until = time.monotonic() + patience_s
        while self._sinks and self._shown < iteration and time.monotonic() < until and not give_up():
            time.sleep(0.01)
