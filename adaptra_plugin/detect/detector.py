"""Which links and stages are slow, since when, and by how much.

Delays are measured per link and compute excludes waiting, so a slow link shows in its own series and in no other: there
is nothing to untangle. What is left is to tell a change from noise (`monitor`), and two cases in which a subject's own
history is no yardstick:

* A link that is slow from the start has a slow history. When every link has its first `min_history` samples, and there
  are at least `MIN_PEERS` links, each is compared once with the (lower) median of the others.
* When the workload changes (longer sequences, a busy machine) most stages change by the same ratio. With at least
  `MIN_PEERS` stages the common ratio is taken out of every stage's score, and once it has held for `confirm`
  iterations the history of all stages is rescaled by it. Otherwise each stage would be blamed in turn.

Scores relative to one's own past and to one's peers are the vocabulary of nvidia-resiliency-ext; what slow links do to
a pipeline is the subject of arXiv 2504.19232, sec. 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect.monitor import Finding, Key, Margin, Monitor
from adaptra_plugin.detect.samples import IterationReport
from adaptra_plugin.detect.window import Window, low_median, low_medians_of_others, median

MIN_PEERS = 3
"""Links (or stages) needed before one is compared with the others."""


@dataclass
class _Replica:
    """State of one pipeline replica."""

    window: int
    seen: int = 0  # iterations observed, those of the warm-up included
    links: dict[Key, Monitor] = field(default_factory=dict)
    stages: dict[int, Monitor] = field(default_factory=dict)
    unscreened: set[Key] = field(default_factory=set)  # links not yet compared with the others
    common: list[float] = field(default_factory=list)  # consecutive common ratios of the stages that call for rescaling
    forward: Window = field(init=False)  # mean forward time of a microbatch over the stages

    def __post_init__(self) -> None:
        self.forward = Window(self.window)


class Detector:
    """Turns the reports of an iteration into findings. One detector serves all replicas of a job."""

    def __init__(self, config: DetectorConfig, stages: int, *, ring: bool = False) -> None:
        """
        Args:
            config: thresholds, windows and hysteresis.
            stages: ranks in every replica. Subjects are what can be slow: ranks and the links between them. A rank with
                several model chunks is one subject, named by the first of its stages.
            ring: the last rank sends to the first one too (several model chunks a rank).

        Raises:
            ValueError: for fewer than one stage.
        """
        if stages < 1:
            raise ValueError(f"{stages} stages: a pipeline has at least one")
        self._config = config
        self._stages = stages
        self._links = links_of(stages, ring=ring)
        self._replicas: dict[int, _Replica] = {}

    def observe(self, reports: Sequence[IterationReport]) -> list[Finding]:
        """Takes the reports of all stages of one replica for one iteration; iterations come in order.

        Returns:
            What changed with this iteration, links first. Usually empty.

        Raises:
            ValueError: if the reports mix iterations or replicas, repeat a stage, or name a stage that does not exist.
        """
        if not reports:
            return []
        self._check(reports)
        state = self._replicas.setdefault(reports[0].replica, _Replica(self._config.window))
        state.seen += 1
        if state.seen <= self._config.warmup_iterations:
            return []
        margin = self._link_margin(state, reports)
        findings = [*self._observe_links(state, reports, margin), *self._observe_stages(state, reports)]
        state.forward.add(_mean_forward(reports))
        return findings

    def slow(self) -> list[Finding]:
        """The latest `slow` finding of every subject that is slow now."""
        return [monitor.slow for monitor in self._monitors() if monitor.slow is not None]

    def link_delay(self, replica: int, src: int, dst: int) -> float | None:
        """Best present estimate (ms) of a directed link's delay; None before its first sample.

        The median since the change if the link is slow, its baseline otherwise.
        """
        state = self._replicas.get(replica)
        monitor = state.links.get(_link(src, dst)) if state else None
        return monitor.current((src, dst)) if monitor else None

    def warm(self, replica: int) -> bool:
        """Whether every stage and every link between neighbours of a replica has enough history to plan with."""
        state = self._replicas.get(replica)
        if state is None or len(state.stages) < self._stages:
            return False
        links = [state.links.get(link) for link in self._links]
        known = [*state.stages.values(), *links]
        return all(monitor is not None and (monitor.mature or monitor.slow is not None) for monitor in known)

    def _monitors(self) -> Iterator[Monitor]:
        for state in self._replicas.values():
            yield from state.links.values()
            yield from state.stages.values()

    def _check(self, reports: Sequence[IterationReport]) -> None:
        first = reports[0]
        if any((report.replica, report.iteration) != (first.replica, first.iteration) for report in reports):
            pairs = sorted({(report.replica, report.iteration) for report in reports})
            raise ValueError(f"reports of one iteration and replica expected, got (replica, iteration) {pairs}")
        stages = sorted(report.stage for report in reports)
        if len(set(stages)) < len(stages) or not 0 <= stages[0] <= stages[-1] < self._stages:
            raise ValueError(f"reports of stages {stages}: each of 0..{self._stages - 1} may report once")

    def _link_margin(self, state: _Replica, reports: Sequence[IterationReport]) -> Margin:
        forward = state.forward.median if len(state.forward) else _mean_forward(reports)
        least = max(self._config.min_delay_ms, self._config.min_delay_fraction * forward)
        return lambda window: max(self._config.spread_factor * window.spread, least)

    def _observe_links(self, state: _Replica, reports: Sequence[IterationReport], margin: Margin) -> list[Finding]:
        replica, iteration = reports[0].replica, reports[0].iteration
        samples: dict[Key, dict[Key, float]] = {}
        for report in reports:
            for item in report.links:
                if item.messages:
                    samples.setdefault(_link(item.src, item.dst), {})[item.src, item.dst] = item.delay_ms
        findings = []
        for link, sample in sorted(samples.items()):
            if link not in state.links:
                state.links[link] = Monitor("link", replica, link, self._config)
                state.unscreened.add(link)
            findings.append(state.links[link].observe(iteration, sample, margin))
        if state.unscreened:
            findings += self._screen(state, margin)
        return [finding for finding in findings if finding]

    def _screen(self, state: _Replica, margin: Margin) -> list[Finding | None]:
        """Compares links that have just got their first history with the others: one may be slow from the start."""
        waiting = [monitor for monitor in state.links.values() if monitor.slow is None and not monitor.mature]
        if waiting:
            return []
        if len(state.links) < MIN_PEERS:
            state.unscreened.clear()
            return []
        # A link is as slow as its worst direction.
        worst = {
            link: max(monitor.baseline[key].median for key in monitor.baseline) for link, monitor in state.links.items()
        }
        references = low_medians_of_others(worst)
        findings: list[Finding | None] = []
        for link in sorted(state.unscreened):
            monitor = state.links[link]
            reference = references[link]
            over = any(window.median > reference + margin(window) for window in monitor.baseline.values())
            found = None
            if over and monitor.slow is None:
                found = monitor.turn_slow_from_start(dict.fromkeys(monitor.baseline, reference), margin)
                findings.append(found)
            if found or not over or monitor.slow is not None:
                state.unscreened.discard(link)
        return findings

    def _observe_stages(self, state: _Replica, reports: Sequence[IterationReport]) -> list[Finding]:
        replica, iteration = reports[0].replica, reports[0].iteration
        for report in reports:
            if report.stage not in state.stages:
                state.stages[report.stage] = Monitor("stage", replica, (report.stage,), self._config)
        pending = self._follow_workload(state, _ratios(state, reports))
        ratios = _ratios(state, reports)  # again: the history may have been rescaled
        others = low_medians_of_others(ratios) if len(ratios) >= MIN_PEERS else {}
        overall = low_median(ratios.values()) if others else 1.0  # for a slow stage, which has no ratio itself
        findings = []
        for report in sorted(reports, key=lambda report: report.stage):
            # Only slowness is taken out: when the others got faster, a stage that did not is no slower than before.
            common = max(1.0, others.get(report.stage, overall))
            sample = {(report.stage, report.stage): report.times.total_ms}
            monitor = state.stages[report.stage]
            findings.append(monitor.observe(iteration, sample, self._stage_margin, common, learn=not pending))
        return [finding for finding in findings if finding]

    def _stage_margin(self, window: Window) -> float:
        return max((self._config.min_slowdown - 1) * window.median, self._config.spread_factor * window.spread)

    def _follow_workload(self, state: _Replica, ratios: dict[int, float]) -> bool:
        """Rescales the stages' history once most of them have changed by the same ratio for `confirm` iterations.

        Returns:
            Whether such a change is suspected but not confirmed: then the iteration is no part of anybody's history.
        """
        if len(ratios) < MIN_PEERS:
            return False
        common = low_median(ratios.values())
        changed = common > self._config.min_slowdown or common < 1 / self._config.min_slowdown
        if not changed or (state.common and (common > 1) != (state.common[0] > 1)):
            state.common.clear()
        if changed:
            state.common.append(common)
        if len(state.common) < self._config.confirm:
            return changed
        factor = median(state.common[len(state.common) // 2 :])
        state.common.clear()
        for stage, monitor in state.stages.items():
            if _nearer(ratios.get(stage, factor), factor):  # one without a ratio is slow already, and goes along
                monitor.rescale(factor)
        return False


def _nearer(ratio: float, factor: float) -> bool:
    """Whether a ratio of times is nearer to a factor than to no change."""
    return ratio > 0 and abs(math.log(ratio / factor)) < abs(math.log(ratio))


def _ratios(state: _Replica, reports: Sequence[IterationReport]) -> dict[int, float]:
    """Compute time of each healthy stage relative to its baseline."""
    ratios = {}
    for report in reports:
        monitor = state.stages[report.stage]
        if monitor.mature and monitor.slow is None:
            base = monitor.baseline[report.stage, report.stage].median
            ratios[report.stage] = report.times.total_ms / base if base > 0 else 1.0
    return ratios


def links_of(ranks: int, *, ring: bool) -> list[Key]:
    """The links between neighbours of a pipeline, (lower, higher) position; of a ring also that between its ends."""
    ends = [(0, ranks - 1)] if ring and ranks > 2 else []
    return [*((low, low + 1) for low in range(ranks - 1)), *ends]


def _link(src: int, dst: int) -> Key:
    return (min(src, dst), max(src, dst))


def _mean_forward(reports: Sequence[IterationReport]) -> float:
    """Of one microbatch on one model chunk."""
    return sum(report.times.forward_ms / len(report.chunks) for report in reports) / len(reports)
