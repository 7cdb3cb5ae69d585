"""Difference between the clocks of two hosts, estimated from pings as NTP does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

DRIFT = 20e-6
"""How much the rate of two monotonic clocks may differ from the one assumed (s per s): what an old sample loses in precision."""
MAX_RATE = 1e-3
"""Clocks that part faster than this (s per s) do not drift: one was set, or stood still with its machine."""
PERIOD_S = 30.0
"""Samples so far apart tell the rate of the clocks."""
PERIODS = 10


@dataclass(frozen=True, slots=True)
class _Sample:
    """One ping. `at`: when it came back (s, local clock); `offset`: as if it had taken as long there as back (s)."""

    at: float
    round_trip: float
    offset: float


class ClockOffset:
    """Remote clock minus local clock (s).

    The error of a sample is at most half its round trip, whatever happened to it on its way, plus what the clocks have
    drifted since, so the sample with the smallest such bound counts: a ping that met a busy host, a full queue or a process
    that stood still does not, however many of them come. A sample ages by time, with the rate at which the clocks part, as far
    as that is known. Two samples whose bounds exclude each other cannot both be right: then the newer one counts.
    """

    def __init__(self) -> None:
        self.count = 0
        """Pings so far."""
        self._best: _Sample | None = None
        self._rate = 0.0
        self._marks: deque[_Sample] = deque(maxlen=PERIODS)  # samples that have counted, a period apart
        self._now = 0.0

    @property
    def offset(self) -> float:
        """When the last ping came back (s)."""
        return self._at(self._now)

    @property
    def round_trip(self) -> float:
        """Of the sample that counts (s)."""
        return self._best.round_trip if self._best is not None else 0.0

    def _at(self, now: float) -> float:
        best = self._best
        return 0.0 if best is None else best.offset + self._rate * (now - best.at)

    def add(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        """One ping: `sent` and `received` on the local clock, the other two on the remote one (s)."""
        self.count += 1
        round_trip = (received - sent) - (remote_sent - remote_received)
        if not -1e-6 <= round_trip < float("inf"):
            return  # a clock was set meanwhile
        sample = _Sample(received, max(0.0, round_trip), ((remote_received - sent) + (remote_sent - received)) / 2)
        self._now = received
        if self._best is None:
            self._take(sample)
            return
        age = received - self._best.at
        bound, own = self._best.round_trip / 2 + age * DRIFT, sample.round_trip / 2
        contradiction = abs(sample.offset - self._at(received)) - bound - own
        if contradiction > age * MAX_RATE:
            self._marks.clear()
            self._rate = 0.0
        if contradiction > 0 or own <= bound:
            self._take(sample)

    def _take(self, sample: _Sample) -> None:
        self._best = sample
        if not self._marks or sample.at - self._marks[-1].at >= PERIOD_S:
            self._marks.append(sample)
        oldest = self._marks[0]
        span = sample.at - oldest.at
        if span >= PERIOD_S and (sample.round_trip + oldest.round_trip) / 2 < span * DRIFT:
            self._rate = (sample.offset - oldest.offset) / span

    def delay(self, remote_sent: float, received: float) -> float:
        """One-way delay (s, >= 0) of what left at `remote_sent` (remote clock) and came at `received` (local clock)."""
        return max(0.0, received - self.local(remote_sent, received))

    def local(self, remote: float, now: float) -> float:
        """A recent time of the remote clock on the local one, which shows `now` (s)."""
        return remote - self._at(now)
