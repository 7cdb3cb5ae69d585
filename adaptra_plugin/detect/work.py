"""How much work an iteration is, as all stages of a replica show it together.

Sequences grow, batches differ, machines are busy: then every stage takes longer, and none is a straggler. So the time of
a stage is taken as its share of the *work* of the iteration, and only shares are compared with their past. The unit of work
is arbitrary (the times of the first iteration); what counts is the ratio to the typical work of recent iterations.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from adaptra_plugin.detect.window import Window, low_median

K = TypeVar("K", bound=Hashable)

UNEVEN = 0.125
"""Where the work grows by a factor, stages may drift apart by this power of it: attention grows with the square of the
sequence, the rest with its length, and each stage has its own mix. Until their shares are known anew, that is no slowness."""


class Work:
    """The work of a replica's iterations."""

    def __init__(self, window: int, min_slowdown: float) -> None:
        """
        Args:
            window: iterations that tell what is typical.
            min_slowdown: two stages whose times have grown by ratios closer than this have grown alike.
        """
        self._recent = Window(window)
        self._min_slowdown = min_slowdown

    @property
    def typical(self) -> float | None:
        """Median over the window; None before the first iteration."""
        return self._recent.median if len(self._recent) else None

    def add(self, work: float) -> None:
        """An iteration has been judged."""
        self._recent.add(work)

    def of(self, readings: Mapping[K, Sequence[float]]) -> tuple[float, dict[K, float]]:
        """Work of an iteration, and what each stage is measured by, from each stage's time over its usual share; a slow
        stage has two readings, one if it is as slow as it was, one if it heals just now.

        Of three stages or more, the median of the others counts for each: most stages are healthy. Of two both together count,
        or each would be the other's only measure. One alone is never slow: nothing tells its work from its speed.
        """
        sure = [reading[0] for reading in readings.values() if len(reading) == 1]
        ratios = {
            stage: reading[0] if len(reading) == 1 else self._likeliest(reading, sure)
            for stage, reading in readings.items()
        }
        if not ratios:
            return self.typical or 1.0, {}
        order = sorted(ratios, key=ratios.__getitem__)
        ordered = [ratios[stage] for stage in order]
        work = self._centre(ordered)
        if len(order) < 3:
            return work, dict.fromkeys(order, work)
        return work, {stage: self._centre(ordered[:place] + ordered[place + 1 :]) for place, stage in enumerate(order)}

    def _centre(self, ordered: Sequence[float]) -> float:
        """The median of sorted ratios. Where its two middle values are too far apart to mean the same work, the lower one:
        what has grown less knows the work, and the rest is slow."""
        low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        return math.sqrt(low * high) if high <= low * self.slowdown(low) else low

    def _likeliest(self, reading: Sequence[float], sure: Sequence[float]) -> float:
        """The one of several readings that is closest to what there was to do lately, and to what healthy stages say."""

        def strangeness(work: float) -> float:
            recent = min((abs(math.log(work / known)) for known in self._recent), default=0.0)
            return 2 * recent + (abs(math.log(work / low_median(sure))) if sure else 0.0)

        return min(reading, key=strangeness)

    def slowdown(self, work: float) -> float:
        """Above this ratio of its share to its past a stage is slow, if the iteration is so much work."""
        growth = max(1.0, work / self.typical) if self.typical else 1.0
        return float(self._min_slowdown * growth**UNEVEN)
