"""The present best estimate of stage times and link delays, as the profile that planning needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from adaptra_plugin.detect.detector import Detector
from adaptra_plugin.detect.monitor import Finding
from adaptra_plugin.detect.samples import IterationReport, StageTimes
from adaptra_plugin.detect.window import median
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile


class Estimator:
    """Robust recent medians.

    Stage times: the median over the window, from the change on for a stage that turned slow or healed. Links: the
    median since the change for a slow one, the baseline for a healthy one.
    """

    def __init__(self, detector: Detector, chunks: int = 1) -> None:
        """
        Args:
            detector: knows the links, and when there is enough history.
            chunks: model chunks of each rank; stage `s` is on the rank at position `s % ranks`.
        """
        self._detector = detector
        self._chunks = chunks
        self._recent: dict[
            tuple[int, int], deque[tuple[int, tuple[StageTimes, ...]]]
        ] = {}  # (replica, position) -> (iteration, times of each chunk)

    def observe(self, reports: Sequence[IterationReport], findings: Sequence[Finding]) -> None:
        """Takes what the detector has just taken, and what it has found in that.

        Args:
            reports: of all ranks of one replica for one iteration; iterations come in order.

        Raises:
            ValueError: a report has another number of chunks.
        """
        if wrong := [report.rank for report in reports if len(report.chunks) != self._chunks]:
            raise ValueError(f"the reports of ranks {wrong} do not have {self._chunks} model chunks")
        for report in reports:
            recent = self._recent.setdefault(
                (report.replica, report.pp_rank), deque(maxlen=self._detector.config.window)
            )
            if recent and _splits(recent[-1][1]) != _splits(report.chunks):
                recent.clear()  # the backward is split now, or no longer is: parts of the two must not be mixed
            recent.append((report.iteration, report.chunks))
        for finding in findings:
            if finding.kind == "stage":
                recent = self._recent[finding.replica, finding.pp_ranks[0]]
                while recent and recent[0][0] < finding.since_iteration:
                    recent.popleft()

    def profile(self, microbatches: int, max_activations: Sequence[int | None], replica: int = 0) -> Profile | None:
        """The profile to plan the next iterations of a replica with; both directions of every link are listed.

        Args:
            microbatches: microbatches of the iterations to plan.
            max_activations: per stage, how many microbatches it may hold; None: no limit.
            replica: pipeline replica; each has its own links.

        Returns:
            None until every stage and link has the history that the detector asks for.

        Raises:
            ValueError: if `max_activations` does not have one entry per stage.
            PlanError: if the profile is refused (microbatches or limits out of range).
        """
        ranks = self._detector.ranks
        if len(max_activations) != ranks * self._chunks:
            raise ValueError(f"{len(max_activations)} limits of activations for {ranks * self._chunks} stages")
        if not self._detector.warm(replica):
            return None
        stages = []
        for stage, limit in enumerate(max_activations):
            chunk, position = divmod(stage, ranks)
            times = [item[chunk] for _, item in self._recent[replica, position]]
            forward = median(item.forward_ms for item in times)
            backward_input = median(item.backward_input_ms for item in times)
            backward_weight = median(item.backward_weight_ms for item in times)
            stages.append(StageProfile(forward, backward_input, backward_weight, limit))
        links = [
            LinkProfile(src, dst, self._delay(replica, src, dst), 0.0)
            for ends in self._detector.links
            for src, dst in (ends, ends[::-1])
        ]
        return Profile(microbatches, tuple(stages), tuple(links), virtual_stages=self._chunks)

    def _delay(self, replica: int, src: int, dst: int) -> float:
        """Delay of one direction (ms); a direction without any message takes that of the other one."""
        delay = self._detector.link_delay(replica, src, dst)
        if delay is None:
            delay = self._detector.link_delay(replica, dst, src)
        return max(0.0, delay or 0.0)  # clocks of two machines may differ by more than a healthy link takes


def _splits(chunks: Sequence[StageTimes]) -> bool:
    return any(times.backward_weight_ms > 0 for times in chunks)
