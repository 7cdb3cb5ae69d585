"""Difference between the clocks of two hosts, estimated from pings as NTP does."""

from __future__ import annotations

from collections import deque

DRIFT = 20e-6
"""Assumed relative drift of two undisciplined monotonic clocks (s per s): what an old sample loses in precision."""


class ClockOffset:
    """`offset` = remote clock minus local clock (s).

    The error of one sample is at most half its round trip plus what the clocks drifted since, so the sample with the
    smallest such bound within the window is used: a ping that met a busy host or a full queue does not count.
    """

    def __init__(self, window: int = 64) -> None:
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=window)  # (taken at, round trip, offset)
        self.offset = 0.0
        self.round_trip = 0.0

    @property
    def count(self) -> int:
        return len(self._samples)

    def add(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        """One ping: `sent` and `received` on the local clock, the other two on the remote one (s)."""
        round_trip = max(0.0, (received - sent) - (remote_sent - remote_received))
        offset = ((remote_received - sent) + (remote_sent - received)) / 2
        self._samples.append((received, round_trip, offset))
        _, self.round_trip, self.offset = min(self._samples, key=lambda s: s[1] / 2 + (received - s[0]) * DRIFT)

    def delay(self, remote_sent: float, received: float) -> float:
        """One-way delay (s, >= 0) of what left at `remote_sent` (remote clock) and came at `received` (local clock)."""
        return max(0.0, received - (remote_sent - self.offset))
