"""Waiting for the sink's thread without guessing how long it takes."""

from __future__ import annotations

import threading
import time
from typing import Any

from adaptra_plugin.report import WandbSink

DEADLINE_S = 10.0
"""Longest wait for another thread; none of the tests gets near it."""


def settle(sink: WandbSink) -> None:
    """Waits until the sink's thread has taken what was queued and has looked for news once more."""
    done = threading.Event()
    real = sink._worker._handle

    def handle(batch: list[Any]) -> None:
        real(batch)
        if not sink._worker._records:
            done.set()

    sink._worker._handle = handle
    with sink._worker._news:
        sink._worker._news.notify()
    assert done.wait(DEADLINE_S)
    sink._worker._handle = real


def own_run_opened(sink: WandbSink) -> Any:
    """Waits until the process of a run of our own says that it is open; the run."""
    until = time.monotonic() + 60
    while True:
        settle(sink)
        run = getattr(sink._feed, "run", None)
        if run is not None and run.where is not None:
            return run
        assert time.monotonic() < until, "no run of our own is open"
        time.sleep(0.05)
