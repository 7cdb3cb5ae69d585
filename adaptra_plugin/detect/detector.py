"""Which links and stages are slow, since when, and by how much.

Delays are measured per link and compute excludes waiting, so a slow link shows in its own series and in no other: there
is nothing to untangle. What is left is to tell a change from noise (`monitor`), and two cases in which a subject's own
history is no yardstick:

* A link that is slow from the start has a slow history. When every link has its first `min_history` samples, and there
  are at least `MIN_PEERS` links, each is compared once with the (lower) median of the others.
* When there is more to do (longer sequences, a busy machine) every stage takes longer. So stages are judged by their share of
  the work of the iteration (`work`), not by their time; and links allow for longer messages (`monitor`). Only slowness counts:
  where there is less to do, a stage that takes as long as ever is no slower than before.

Scores relative to one's own past and to one's peers are the vocabulary of nvidia-resiliency-ext; what slow links do to
a pipeline is the subject of arXiv 2504.19232, sec. 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect.monitor import Finding, Key, Margin, Monitor
from adaptra_plugin.detect.samples import IterationReport
from adaptra_plugin.detect.window import Window, low_median, low_medians_of_others
from adaptra_plugin.detect.work import Work

MIN_PEERS = 3
"""Links needed before one is compared with the others."""


@dataclass
class _Replica:
    """State of one pipeline replica."""

    window: int
    work: Work
    seen: int = 0  # iterations observed, those of the warm-up included
    links: dict[Key, Monitor] = field(default_factory=dict)
    stages: dict[int, Monitor] = field(default_factory=dict)
    unscreened: set[Key] = field(default_factory=set)  # links not yet compared with the others
    forward: Window = field(init=False)  # mean forward time of a microbatch over the stages

    def __post_init__(self) -> None:
        self.forward = Window(self.window)


class Detector:
    """Turns the reports of an iteration into findings. One detector serves all replicas of a job."""

    def __init__(self, config: DetectorConfig, ranks: int, *, wraparound: bool = False) -> None:
        """
        Args:
            config: thresholds, windows and hysteresis.
            ranks: in every replica. Subjects are what can be slow: ranks and the links between them. A rank with
                several model chunks is one subject, named by the first of its stages.
            wraparound: the last rank sends to the first one too (several model chunks a rank).

        Raises:
            ValueError: for fewer than one rank.
        """
        if ranks < 1:
            raise ValueError(f"{ranks} stages: a pipeline has at least one")
        self.config = config
        self.ranks = ranks
        self.links = links_of(ranks, wraparound=wraparound)
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
        config = self.config
        state = self._replicas.setdefault(
            reports[0].replica, _Replica(config.window, Work(config.window, config.min_slowdown))
        )
        state.seen += 1
        if state.seen <= config.warmup_iterations:
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
        if state is None or len(state.stages) < self.ranks:
            return False
        links = [state.links.get(link) for link in self.links]
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
        stages = sorted(report.pp_rank for report in reports)
        if len(set(stages)) < len(stages) or not 0 <= stages[0] <= stages[-1] < self.ranks:
            raise ValueError(f"reports of stages {stages}: each of 0..{self.ranks - 1} may report once")

    def _link_margin(self, state: _Replica, reports: Sequence[IterationReport]) -> Margin:
        forward = state.forward.median if len(state.forward) else _mean_forward(reports)
        least = max(self.config.min_delay_ms, self.config.min_delay_fraction * forward)
        return lambda window: max(self.config.spread_factor * window.spread, least)

    def _observe_links(self, state: _Replica, reports: Sequence[IterationReport], margin: Margin) -> list[Finding]:
        replica, iteration = reports[0].replica, reports[0].iteration
        samples: dict[Key, dict[Key, float]] = {}
        sizes: dict[Key, float] = {}
        for report in reports:
            for item in report.links:
                if item.messages:
                    samples.setdefault(_link(item.src, item.dst), {})[item.src, item.dst] = item.delay_ms
                    sizes[item.src, item.dst] = item.message_bytes
        findings = []
        for link, sample in sorted(samples.items()):
            if link not in state.links:
                state.links[link] = Monitor("link", replica, link, self.config)
                state.unscreened.add(link)
            known = {key: sizes[key] for key in sample if sizes[key] > 0}
            findings.append(state.links[link].observe(iteration, sample, margin, sizes=known))
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
            if report.pp_rank not in state.stages:
                state.stages[report.pp_rank] = Monitor("stage", replica, (report.pp_rank,), self.config)
        readings = {report.pp_rank: reading for report in reports if (reading := _readings(state, report))}
        work, measures = state.work.of(readings)
        typical = state.work.typical or work
        # two stages are compared with each other: their ratio has twice the spread of what each of them differs from the mean
        spreads = self.config.spread_factor * (2 if len(readings) == 2 else 1)
        findings = []
        for report in sorted(reports, key=lambda report: report.pp_rank):
            measure = measures.get(report.pp_rank, work)
            slowdown = state.work.slowdown(measure)
            findings.append(
                state.stages[report.pp_rank].observe(
                    iteration,
                    {(report.pp_rank, report.pp_rank): report.times.total_ms / measure},
                    self._stage_margin(slowdown, spreads),
                    ease=max(1.0, typical / measure),
                    scale=measure,
                )
            )
        state.work.add(work)
        return [finding for finding in findings if finding]

    @staticmethod
    def _stage_margin(slowdown: float, spreads: float) -> Margin:
        return lambda window: max((slowdown - 1) * window.median, spreads * window.spread)


def _readings(state: _Replica, report: IterationReport) -> list[float]:
    """Time of a stage over its usual share of the work: the work of the iteration as this stage knows it. Two readings if it
    is slow: it is as slow as it was, or it heals in this very iteration."""
    monitor, total = state.stages[report.pp_rank], report.times.total_ms
    key = (report.pp_rank, report.pp_rank)
    window, slow = monitor.baseline.get(key), monitor.current(key) if monitor.slow else None
    # of two iterations the mean would be half an outlier, if one of them is: then everything that follows looks like less work
    usual = (low_median(window) if len(window) == 2 else window.median) if window else None
    return [total / share for share in (usual, slow) if share] if total > 0 else []


def links_of(ranks: int, *, wraparound: bool) -> list[Key]:
    """The links between neighbours of a pipeline, (lower, higher) position; with wraparound also that between its ends."""
    ends = [(0, ranks - 1)] if wraparound and ranks > 2 else []
    return [*((low, low + 1) for low in range(ranks - 1)), *ends]


def _link(src: int, dst: int) -> Key:
    return (min(src, dst), max(src, dst))


def _mean_forward(reports: Sequence[IterationReport]) -> float:
    """Of one microbatch on one model chunk."""
    return sum(report.times.forward_ms / len(report.chunks) for report in reports) / len(reports)
