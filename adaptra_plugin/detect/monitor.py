"""One subject (a link or a stage) and its way from healthy to slow and back.

A subject has one series of samples per key: a link one per direction, a stage one for its compute. In each iteration
every key gets a score,

    score = (sample - baseline median) / (threshold - baseline median),

so that 1 is the threshold and 0 the baseline; the worst key speaks for the subject. A link's messages that are longer than
those of its baseline may take longer in proportion; that is no part of the score.

* healthy -> slow: `confirm` consecutive iterations with a score above 1.
* slow -> healed: `heal` consecutive iterations with a score below `release`.
* slow -> slow at another level: the extra delay moved by more than half up (for `confirm` iterations) or by a third
  down (for `heal` iterations), and by more than its own noise; or its median crept as far: worth another plan.

Iterations over the threshold do not enter the baseline, but for a single one that passed at once: that is noise, which
the median bears and the spread must know of. A subject with two or more such spikes in its recent past needs as many
more iterations to confirm a change that is not clearly higher than they were. A subject that turns slow again soon
after it healed needs twice as many good iterations the next time, four times after that, up to `2 ** MAX_RELAPSES`: a
link that flaps ends up being treated as slow, which costs little, instead of causing a new plan every few iterations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect.window import Window, median

LEVEL_RATIO = 1.5
"""A slow subject whose extra time changes by more than this ratio, either way, is reported again."""
MAX_RELAPSES = 5
"""The good iterations asked of a flapping subject double at most this often."""
SPIKE_WINDOWS = 4
"""Spikes are remembered for this many windows."""
SPIKE_RATIO = 2 / 3
"""A spike of this share of a present excess makes it suspect; higher changes are confirmed as quickly as ever."""
MUTE_SHARE = 4
"""Iterations that say nothing enter the baseline once they have lasted for this part of a window: then they are usual."""
RELAPSE_WINDOWS = 2
"""Slow again within this many windows after healing counts as a relapse."""


@dataclass(frozen=True)
class Finding:
    """A subject that turned slow, changed its level while slow, or healed. Times are ms."""

    kind: Literal["link", "stage"]
    replica: int
    pp_ranks: tuple[int, ...]
    """Positions in the pipeline. A link: (lower, higher). A stage: that of its rank."""
    state: Literal["slow", "healed"]
    since_iteration: int
    """First iteration over the threshold (slow), at the new level, or under the release threshold (healed)."""
    found_iteration: int
    """Iteration whose reports confirmed it."""
    before_ms: float
    """Link: one-way delay of the worst direction before; stage: compute time of a microbatch before."""
    after_ms: float
    """The same now."""
    threshold_ms: float
    """What `after_ms` exceeds (slow) or stays under (healed). The three times of a stage are those that it would take for the
    work of the iteration in which it was found."""
    directions: tuple[tuple[int, int, float], ...] = ()
    """Links only: (source stage, destination stage, delay now) of each direction."""

    @property
    def name(self) -> str:
        """`2-3` for a link, `2` for a stage."""
        return "-".join(map(str, self.pp_ranks))


Key = tuple[int, int]
"""(source, destination) stage of a direction; a stage's own series has the key (stage, stage)."""
Samples = Mapping[Key, float]
Seen = tuple[int, Samples, Samples]
"""(iteration, samples, sizes)."""
Margin = Callable[[Window], float]


class Monitor:
    """State machine of one subject; see the module's description."""

    def __init__(
        self, kind: Literal["link", "stage"], replica: int, pp_ranks: tuple[int, ...], config: DetectorConfig
    ) -> None:
        self.kind: Literal["link", "stage"] = kind
        self.replica = replica
        self.pp_ranks = pp_ranks
        self.slow: Finding | None = None
        """The latest `slow` finding while the subject is slow."""
        self.baseline: dict[Key, Window] = {}
        self.iterations: deque[int] = deque(maxlen=config.window)
        """Iterations that the baseline holds."""
        self._config = config
        self._sizes: dict[Key, Window] = {}  # of the messages that the baseline is made of
        self._scale = 1.0  # ms of a sample's unit in this iteration
        self._level: dict[Key, Window] = {}  # samples at the present slow level
        self._margins: dict[Key, float] = {}  # threshold minus baseline median (ms); stays as it is while slow
        self._reported = 0.0  # the level last reported
        self._streak: list[Seen] = []  # consecutive iterations that argue for a change of state
        self._mute: list[Seen] = []  # iterations that said nothing, not yet part of the baseline
        self._muted = 0  # ... in a row
        self._shift: list[Seen] = []  # consecutive iterations that argue for another slow level
        self._shift_up = False
        self._heights: list[float] = []  # scores of the streak of a healthy subject
        self._spikes: deque[tuple[int, float]] = deque()  # (count of healthy iterations, score) of changes that passed
        self._seen = 0
        self._healthy_for = 0  # iterations since it healed
        self._relapses = 0
        self._healed_before = False

    @property
    def mature(self) -> bool:
        """Whether there is enough history to judge by."""
        ready = (len(window) >= self._config.min_history for window in self.baseline.values())
        return bool(self.baseline) and all(ready)

    def current(self, key: Key) -> float | None:
        """Best present estimate (ms): the median since the change while slow, the baseline median otherwise."""
        window = (self._level if self.slow else self.baseline).get(key)
        return window.median if window else None

    def observe(
        self,
        iteration: int,
        samples: Samples,
        margin: Margin,
        *,
        sizes: Samples | None = None,
        ease: float = 1.0,
        scale: float = 1.0,
    ) -> Finding | None:
        """Takes the samples of one iteration.

        Args:
            iteration: its number.
            samples: one per key (ms / scale); a key without a message is left out.
            margin: threshold minus median for a baseline window.
            sizes: bytes of a message, per key, where known.
            ease: samples of a healthy subject that are no longer over the threshold once they are divided by this (1 or
                more) say nothing: they neither confirm a change nor end one that waits to be confirmed.
            scale: findings give samples times this (ms).

        Returns:
            A finding if the state or the level changed with this iteration.
        """
        if not samples:
            return None
        seen = (iteration, samples, sizes or {})
        self._scale = scale
        if self.slow is not None:
            return self._observe_slow(seen)
        self._healthy_for += 1
        self._seen += 1
        self._set_margins(margin)
        scores = self._scores(seen)
        over = bool(scores) and max(scores.values()) > 1
        if not over:
            self._end_streak()
            self._learn(*self._mute, seen)
            self._mute, self._muted = [], 0
            return None
        if max(self._scores(seen, ease).values()) <= 1:
            self._mute.append(seen)
            self._muted += 1
            if self._muted >= self._config.window // MUTE_SHARE:
                self._learn(*self._mute)
                self._mute = []
            return None
        self._muted = 0
        self._streak.append(seen)
        self._heights.append(max(scores.values()))
        if len(self._streak) < self._needed():
            return None
        streak, self._streak, self._heights, self._mute = self._streak, [], [], []
        relapse = self._healed_before and self._healthy_for <= RELAPSE_WINDOWS * self._config.window
        self._relapses = min(self._relapses + 1, MAX_RELAPSES) if relapse else 0
        before = {key: window.median for key, window in self.baseline.items() if window}
        return self._turn_slow(streak, before)

    def _needed(self) -> int:
        """Iterations over the threshold that confirm a change: more where as much has often come and gone at once."""
        oldest = self._seen - SPIKE_WINDOWS * self._config.window
        while self._spikes and self._spikes[0][0] < oldest:
            self._spikes.popleft()
        height = median(self._heights)
        alike = sum(spike > SPIKE_RATIO * height for _, spike in self._spikes)
        return self._config.confirm + (alike if alike >= 2 else 0)

    def _end_streak(self) -> None:
        """The threshold was exceeded for a moment: noise of a healthy subject."""
        if self._streak:
            self._spikes.append((self._seen, max(self._heights)))
        if len(self._streak) == 1:
            # Median and MAD bear it, and a baseline without its own noise would find ever more iterations unusual.
            self._learn(self._streak[0])
        self._streak.clear()
        self._heights.clear()

    def turn_slow_from_start(self, references: Mapping[Key, float], margin: Margin) -> Finding | None:
        """Declares slow a subject that has been slow since it was first seen, judged by its peers.

        The peers' delays (`references`, ms per key) stand in for the baseline until the subject heals.

        Returns:
            The finding; None while fewer than `confirm` of the latest samples are over the threshold.
        """
        history = {key: list(window) for key, window in self.baseline.items()}
        streak: list[Seen] = []
        for back, iteration in enumerate(reversed(self.iterations), start=1):
            sample = {key: values[-back] for key, values in history.items() if back <= len(values)}
            if all(value <= references[key] + margin(self.baseline[key]) for key, value in sample.items()):
                break
            streak.insert(0, (iteration, sample, {}))
        streak += self._streak
        if len(streak) < self._config.confirm:
            return None
        for key, reference in references.items():
            self.baseline[key] = Window(self._config.window, [reference])
        self._streak, self._heights = [], []
        self._set_margins(margin)
        return self._turn_slow(streak, dict(references))

    def _learn(self, *history: Seen) -> None:
        for iteration, samples, sizes in history:
            self.iterations.append(iteration)
            for known, new in ((self.baseline, samples), (self._sizes, sizes)):
                for key, value in new.items():
                    known.setdefault(key, Window(self._config.window)).add(value)

    def _set_margins(self, margin: Margin) -> None:
        # Only while healthy: a threshold that moved with the rest of the pipeline could heal a link that has not changed.
        self._margins = {key: max(margin(window), 1e-9) for key, window in self.baseline.items()}

    def _scores(self, seen: Seen, ease: float = 1.0) -> dict[Key, float]:
        """Score per key; a healthy subject's keys with too little history have none."""
        _, samples, sizes = seen
        scores = {}
        for key, value in samples.items():
            window = self.baseline.get(key)
            if window is None or (self.slow is None and len(window) < self._config.min_history):
                continue
            longer = self._longer(key, sizes.get(key, 0.0))
            scores[key] = (value / ease - longer - window.median) / self._margins[key]
        return scores

    def _longer(self, key: Key, size: float) -> float:
        """What a message of this size may take (ms) beyond those of the baseline."""
        known = self._sizes.get(key)
        if known is None or size <= known.median or known.median <= 0:
            return 0.0
        # two clocks that differ show in both directions, with opposite signs: the mean of the two is free of that
        medians = [window.median for window in self.baseline.values()]
        usual = max(0.0, self.baseline[key].median, sum(medians) / len(medians))
        return usual * (size / known.median - 1)

    def _turn_slow(self, streak: Sequence[Seen], before: Mapping[Key, float]) -> Finding:
        # The first iteration of a change is often half in the old state: the later half of the streak tells the level.
        keys = {key for _, sample, _ in streak for key in sample}
        for key in keys:
            values = [sample[key] for _, sample, _ in streak[len(streak) // 2 :] if key in sample]
            values = values or [sample[key] for _, sample, _ in streak if key in sample]
            self._level[key] = Window(self._config.window, values)
        self._shift.clear()
        return self._report_slow(streak[0][0], streak[-1][0], before.get(self._worst()))

    def _report_slow(self, since: int, found: int, before: float | None) -> Finding:
        worst = self._worst()
        base = self.baseline[worst]
        present = {key: window.median for key, window in self._level.items()}
        limit, before = base.median + self._margins[worst], base.median if before is None else before
        self._reported = present[worst]
        self.slow = self._finding("slow", since, found, before, self._reported, limit, present)
        return self.slow

    def _observe_slow(self, seen: Seen) -> Finding | None:
        scores = self._scores(seen)
        if not scores:
            return None
        if max(scores.values()) < self._config.release:
            if self._worst() not in scores:
                return None  # the other direction alone says nothing about the slow one
            self._shift.clear()
            self._streak.append(seen)
            return self._heal() if len(self._streak) >= self._config.heal << self._relapses else None
        self._streak.clear()
        return self._observe_level(seen)

    def _observe_level(self, seen: Seen) -> Finding | None:
        iteration, samples, _ = seen
        worst = self._worst()
        level, base = self._level[worst], self.baseline[worst]
        present = max(samples[key] - self.baseline[key].median for key in samples if key in self.baseline)
        known = level.median - base.median
        noise = max(self._margins[worst], self._config.spread_factor * level.spread)
        up = present > known * LEVEL_RATIO and present - known > noise
        down = present < known / LEVEL_RATIO and known - present > noise
        if not up and not down:
            self._shift.clear()
            for key, value in samples.items():
                self._level.setdefault(key, Window(self._config.window)).add(value)
            return self._observe_drift(iteration)
        if up != self._shift_up:
            self._shift.clear()
        self._shift_up = up
        self._shift.append(seen)
        if len(self._shift) < (self._config.confirm if up else self._config.heal):
            return None
        before = {key: window.median for key, window in self._level.items()}
        shift, self._shift = self._shift, []
        return self._turn_slow(shift, before)

    def _observe_drift(self, iteration: int) -> Finding | None:
        """Reports a slow subject again whose level has crept away from the one last reported."""
        worst = self._worst()
        level, base = self._level[worst], self.baseline[worst]
        reported, present = self._reported - base.median, level.median - base.median
        far = present > reported * LEVEL_RATIO or present < reported / LEVEL_RATIO
        # A median of n samples is uncertain by about their spread over the root of n.
        noise = max(self._margins[worst], self._config.spread_factor * level.spread / math.sqrt(len(level)))
        if not far or abs(present - reported) <= noise or len(level) < self._config.window // 2:
            return None
        return self._report_slow(iteration, iteration, self._reported)

    def _heal(self) -> Finding:
        worst = self._worst()
        before, base = self._level[worst].median, self.baseline[worst]
        streak, self._streak = self._streak, []
        present = {
            key: median(sample[key] for _, sample, _ in streak if key in sample)
            for key in {key for _, sample, _ in streak for key in sample}
        }
        limit = base.median + self._config.release * self._margins[worst]
        finding = self._finding(
            "healed", streak[0][0], streak[-1][0], before, present.get(worst, base.median), limit, present
        )
        self._learn(*streak)
        self.slow = None
        self._level.clear()
        self._healed_before, self._healthy_for = True, 0
        return finding

    def _worst(self) -> Key:
        """The key that speaks for the subject while it is slow: the highest score at the present level."""

        def score(key: Key) -> float:
            base = self.baseline.get(key)
            return (self._level[key].median - base.median) / self._margins[key] if base else float("-inf")

        return max(self._level, key=score)

    def _finding(
        self,
        state: Literal["slow", "healed"],
        since: int,
        found: int,
        before: float,
        after: float,
        threshold: float,
        present: Samples,
    ) -> Finding:
        directions = sorted(present.items()) if self.kind == "link" else []
        return Finding(
            kind=self.kind,
            replica=self.replica,
            pp_ranks=self.pp_ranks,
            state=state,
            since_iteration=since,
            found_iteration=found,
            before_ms=before * self._scale,
            after_ms=after * self._scale,
            threshold_ms=threshold * self._scale,
            directions=tuple((src, dst, delay) for (src, dst), delay in directions),
        )
