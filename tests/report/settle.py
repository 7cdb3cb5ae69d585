"""Waiting for the sink's thread without guessing how long it takes."""

from __future__ import annotations

import threading
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
