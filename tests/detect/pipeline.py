"""A pipeline that exists only as measurements: seeded noise, links and stages made slow on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect import Detector, Estimator, Finding, IterationReport, LinkDelay, StageTimes

Extra = Callable[[int, int], float]  # (lower stage of the link, iteration) -> extra ms
Factor = Callable[[int, int], float]  # (stage, iteration) -> ratio


@dataclass
class Pipeline:
    stages: int = 4
    forward_ms: float = 10.0
    base_delay_ms: float = 0.4
    noise_ms: float = 0.1
    noise_compute: float = 0.03
    extra: Extra = lambda link, iteration: 0.0
    only: int = 0  # 1: the extra delay hits forward messages only; -1: backward ones only
    factor: Factor = lambda stage, iteration: 1.0
    microbatches: Callable[[int], int] = lambda iteration: 8
    message_bytes: Callable[[int], float] = lambda iteration: 0.0
    replica: int = 0
    seed: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def reports(self, iteration: int) -> list[IterationReport]:
        return [self._report(stage, iteration) for stage in range(self.stages)]

    def _report(self, stage: int, iteration: int) -> IterationReport:
        microbatches = self.microbatches(iteration)
        links = []
        for src in (stage - 1, stage + 1):
            if 0 <= src < self.stages:
                delay = self.base_delay_ms + abs(self.random.gauss(0, self.noise_ms))
                if not self.only or (stage - src) == self.only:
                    delay += self.extra(min(src, stage), iteration)
                links.append(LinkDelay(src, stage, delay, microbatches, self.message_bytes(iteration)))
        pace = self.forward_ms * self.factor(stage, iteration) * (1 + abs(self.random.gauss(0, self.noise_compute)))
        times = StageTimes(pace, pace, 0.8 * pace)
        return IterationReport(
            replica=self.replica,
            pp_rank=stage,
            rank=self.replica * self.stages + stage,
            host=f"n{stage}",
            iteration=iteration,
            microbatches=microbatches,
            iteration_ms=3 * pace * microbatches,
            plan_version=1,
            chunks=(times,),
            links=tuple(links),
        )

    def run(self, detector: Detector, iterations: int) -> list[Finding]:
        return [finding for i in range(iterations) for finding in detector.observe(self.reports(i))]


def findings(iterations: int, config: DetectorConfig | None = None, **settings: object) -> list[Finding]:
    """What a fresh detector finds in a pipeline with these settings."""
    pipeline = Pipeline(**settings)  # type: ignore[arg-type]
    return pipeline.run(Detector(config or DetectorConfig(), pipeline.stages), iterations)


def short(found: list[Finding]) -> Iterator[tuple[str, str, str, int, int]]:
    for finding in found:
        yield finding.kind, finding.name, finding.state, finding.since_iteration, finding.found_iteration


class Watch:
    """A detector and the estimator that it feeds."""

    def __init__(self, config: DetectorConfig, ranks: int) -> None:
        self.detector = Detector(config, ranks)
        self.estimator = Estimator(self.detector)
        self.profile = self.estimator.profile

    def observe(self, reports: list[IterationReport]) -> list[Finding]:
        found = self.detector.observe(reports)
        self.estimator.observe(reports, found)
        return found
