"""Notices that its own process stood still."""

from __future__ import annotations

import time
from collections.abc import Callable

BEAT_S = 0.025
"""A loop that waits wakes up so often, to notice that it could not have."""
STANDSTILL_S = 0.025
"""Not to run for so long, though there was something to do, counts. With `BEAT_S`, no pause of 50 ms passes unseen: shorter
ones of a throttled process (100 ms periods) spoil less than half of its messages, which a median bears."""
_FRESH_S = 0.005


class Pulse:
    """Of one loop, which says when it has slept and worked.

    A process is stopped by a signal, throttled by a quota of CPU time, starved, or moved to another machine. All of that shows
    in the same way: more time has passed than it slept on purpose, or spent computing.

    Args:
        clock: seconds. cpu: CPU time of the process (s).
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self.stood: Callable[[float], None] = lambda seconds: None
        """Is told of a pause: the seconds up to now that hold it."""
        self._clock, self._cpu = clock, cpu
        self._mark = self._used_at = clock()
        self._used = cpu()

    def slept(self, allowed_s: float) -> float:
        """The loop has waited for an event, `allowed_s` at most. How long that and what it did before took (s)."""
        return self._step(allowed_s)

    def worked(self) -> None:
        """The loop has done something since."""
        self._step(0.0)

    def _step(self, allowed_s: float) -> float:
        now = self._clock()
        took, self._mark = now - self._mark, now
        late = took - allowed_s
        still = late > STANDSTILL_S and late - (self._cpu() - self._used) > STANDSTILL_S
        if now - self._used_at > _FRESH_S:  # a system call, not for every turn
            self._used_at, self._used = now, self._cpu()
        if still:
            self.stood(took)
        return took
