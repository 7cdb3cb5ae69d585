"""What all ranks have measured: their reports put together by iteration, what is slow, and the profile to plan with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect import Detector, Estimator, Finding, IterationReport
from adaptra_plugin.runtime.messages import Refused, Report, check_report
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.profile import Profile

logger = logging.getLogger("adaptra")

MOST_PENDING = 64
"""Iterations that may wait for the reports of some ranks."""
Reports = Mapping[int, IterationReport | None]
"""Of one iteration, by rank; None: one that was refused."""


class Collector:
    """Puts reports together by iteration.

    Args:
        topology: of the job.
        parts: hear of ranks whose reports are refused.
        begun: the newest iteration that has begun on this rank.
    """

    def __init__(self, topology: Topology, parts: Parts, begun: Callable[[], int]) -> None:
        self._topology = topology
        self._parts = parts
        self._begun = begun
        self._reports: dict[int, dict[int, IterationReport | None]] = {}
        self._heard: dict[int, int] = {}  # newest iteration that each rank has reported
        self.newest = 0
        """Newest iteration that any rank has reported."""
        self.complete = -1
        """Newest iteration that all ranks have reported."""

    def take(self, rank: int, message: Report | Refused) -> Reports | None:
        """A report, or what should be one: then the other ranks' of the same iteration count without it. All reports of an
        iteration once the last one is there."""
        part = f"measuring of rank {rank}"
        report, iteration = None, max(self._heard.get(rank, -1), self.complete) + 1
        try:
            if isinstance(message, Refused):
                raise ValueError(message.why)
            found = message.unpack()
            check_report(found, rank, self._topology, self._begun())
        except ValueError as error:
            if not self._parts.is_lost(part):
                logger.warning("coordinator: a report of rank %d is refused: %s", rank, error)
            self._parts.lost(
                part, "its stage and the links into it are not judged, its reports are refused", str(error)
            )
        else:
            self._parts.works(part)
            report, iteration = found, found.iteration
        self._heard[rank] = max(self._heard.get(rank, -1), iteration)
        return self._add(rank, iteration, report)

    def _add(self, rank: int, iteration: int, report: IterationReport | None) -> Reports | None:
        if iteration <= self.complete:
            return None
        self.newest = max(self.newest, iteration)
        together = self._reports.setdefault(iteration, {})
        together[rank] = report or together.get(rank)
        while len(self._reports) > MOST_PENDING:
            del self._reports[min(self._reports)]
        if len(together) < self._topology.world_size:
            return None
        for old in [i for i in self._reports if i <= iteration]:
            del self._reports[old]
        self.complete = iteration
        return together


class Measurements:
    """Judges the reports of every pipeline, and estimates its profile.

    Args:
        config: of the detector.
        topology: of the job.
        limits: activation limit per stage.
    """

    def __init__(self, config: DetectorConfig, topology: Topology, limits: Sequence[int | None]) -> None:
        self._pipelines = topology.pipelines
        self._limits = list(limits)
        self._detector = Detector(config, topology.length, wraparound=topology.chunks > 1)
        self._estimator = Estimator(self._detector, topology.chunks)
        self.findings: list[Finding] = []
        """What has been found and is not answered yet."""

    def observe(self, together: Reports) -> None:
        for pipeline in self._pipelines:
            reports = [report for rank in pipeline if (report := together[rank]) is not None]
            findings = self._detector.observe(reports)
            self.findings += findings
            self._estimator.observe(reports, findings)

    def profiles(self, microbatches: int) -> list[Profile | None]:
        """Of each pipeline; None: not known yet. Raises PlanError if one is refused."""
        return [self._estimator.profile(microbatches, self._limits, replica) for replica in range(len(self._pipelines))]
