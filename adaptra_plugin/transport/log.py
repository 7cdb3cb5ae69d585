"""The transport's logger, and a limit on lines that a stranger can provoke."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("adaptra.transport")


class RateLimit:
    """Allows `burst` lines at once and one more every `every_s`; counts what it held back."""

    def __init__(self, burst: int = 10, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._every_s = every_s
        self._clock = clock
        self._tokens = float(burst)
        self._last = clock()
        self._held = 0

    def allow(self) -> int | None:
        """None: stay silent. Otherwise the number of lines held back since the last one that was allowed."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) / self._every_s)
        self._last = now
        if self._tokens < 1:
            self._held += 1
            return None
        self._tokens -= 1
        held, self._held = self._held, 0
        return held
