"""A bounded queue with a thread of its own: what every sink stands on.

The training thread only appends to a deque. When the consumer falls behind, the oldest records go and are counted: news
is worth more than history, and memory stays bounded.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from adaptra_plugin.shortage import begin

T = TypeVar("T")


class BatchWorker(Generic[T]):
    """Hands batches of records to `handle` on a daemon thread. In a forked child it takes nothing and has nothing to end."""

    def __init__(
        self,
        name: str,
        handle: Callable[[list[T]], None],
        finish: Callable[[], None],
        limit: int,
        tick_s: float = 1.0,
    ) -> None:
        """
        Args:
            name: of the thread.
            handle: consumes a batch; must not raise. Called with an empty batch when nothing came for `tick_s`.
            finish: called once on the thread after the last batch; must not raise.
            limit: records that may wait.
            tick_s: longest time (s) between two calls of `handle`.
        """
        self._handle = handle
        self._finish = finish
        self._limit = limit
        self._tick_s = tick_s
        self._records: deque[T] = deque()
        self._dropped = 0
        self._closing = False
        self._news = threading.Condition()
        self._process = os.getpid()  # a forked child has neither the thread nor, perhaps, a lock that works
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closing = not begin(self._thread, f"report: {name} cannot be started, and its records are lost")

    def put(self, record: T) -> None:
        """Queues a record; never blocks for longer than another thread needs to append or to take the whole queue."""
        if os.getpid() != self._process:
            return
        with self._news:
            if self._closing:
                return
            if len(self._records) >= self._limit:
                self._records.popleft()
                self._dropped += 1
            self._records.append(record)
            self._news.notify()

    def take_dropped(self) -> int:
        """Records dropped since the last call."""
        with self._news:
            dropped, self._dropped = self._dropped, 0
            return dropped

    def close(self, deadline_s: float) -> bool:
        """Ends the thread after what is queued; may be called again.

        Args:
            deadline_s: longest wait. The thread is a daemon: past the deadline it cannot keep the process alive.

        Returns:
            Whether everything was consumed in time.
        """
        if os.getpid() != self._process:
            return True
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._news:
                if not self._records and not self._closing:
                    self._news.wait(self._tick_s)
                batch = list(self._records)
                self._records.clear()
                closing = self._closing
            self._handle(batch)
            if closing:
                break
        self._finish()
