"""The coordinator (world rank 0): collects reports, detects, plans, and leads the switch to a new plan.

It works on a thread of its own. Everything it needs is passed in, so that tests run it without processes or sockets.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.detect import Detector, Estimator, Finding, IterationReport, overview
from adaptra_plugin.errors import PlanError, TransportError
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.refine import Refinement
from adaptra_plugin.schedule.simulator import simulate
from adaptra_plugin.shortage import told

logger = logging.getLogger("adaptra")
Refiner = Callable[[Profile, Plan], Refinement]

MARGIN = 2
"""Iterations between the newest one known to have begun and the first one of a new plan."""
MAX_TRIES = 6
"""Proposals of one plan, each with twice the margin of the one before, until all ranks can still take part."""
WORTH = 0.01
"""A plan that is predicted to be shorter by less than this ratio does not replace the running one."""
REFRESH = 10
"""Iterations after which the running plan is compared with the best one for the newest profile, without any finding."""
VOTE_DEADLINE_S = 30.0
"""Longest time (s) the ranks may take to answer a proposal."""
REFINE_GAP = 0.005
"""A plan further than this from its lower bound is given to the exact solver, and replaced by one better by as much."""
REFRESH_WORTH = 0.03
"""... and replaced if that is predicted to be shorter by this ratio: estimates get better with time, and drift."""


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile for all replicas: the slowest of each stage and link.

    Replicas wait for each other at the end of an iteration, and a plan made for a slower link costs a fast replica only memory.
    """
    first = profiles[0]
    stages = tuple(
        StageProfile(
            max(s.forward_ms for s in same),
            max(s.backward_input_ms for s in same),
            max(s.backward_weight_ms for s in same),
            same[0].max_activations,
        )
        for same in zip(*(p.stages for p in profiles), strict=True)
    )
    links = tuple(
        LinkProfile(
            link.src,
            link.dst,
            max(p.link(link.src, link.dst).latency_ms for p in profiles),
            max(p.link(link.src, link.dst).transfer_ms for p in profiles),
        )
        for link in first.links
    )
    return replace(first, stages=stages, links=links)


@dataclass
class _Vote:
    """A proposal that waits for the ranks' answers."""

    version: int
    profile: Profile
    plan: Plan
    first_iteration: int
    findings: list[Finding]
    predicted_before_ms: float
    reason: str
    tries: int
    deadline: float
    answers: dict[int, tuple[bool, int]] = field(default_factory=dict)


class Coordinator:
    """Drives detection, planning and the two-phase switch.

    Args:
        topology: of the job; this rank is world rank 0.
        config: the whole configuration.
        hosts: host name of every rank.
        send: `(rank, message)`, never blocks; for the own rank it calls the session directly.
        on_event: receives every `StragglerEvent`.
        on_plan: `(version, first iteration, plan, profile, reason)` after a commit.
        on_overview: receives the metrics of the whole pipeline, once an iteration.
        limits: activation limit per stage.
        refiner: starts the exact improvement of a plan; by default CP-SAT in a worker process, if OR-tools is installed.
        current: the plan that runs now, for a number of microbatches.
        begun: the newest iteration that has begun on this rank.
    """

    def __init__(
        self,
        topology: Topology,
        config: AdaptraConfig,
        hosts: Mapping[int, str],
        *,
        send: Callable[[int, dict[str, Any]], None],
        on_event: Callable[[StragglerEvent], None],
        on_plan: Callable[[int, int, Plan, Profile, str], None],
        on_overview: Callable[[dict[str, Any]], None],
        current: Callable[[int], Plan],
        begun: Callable[[], int],
        limits: Sequence[int | None],
        clock: Callable[[], float] = time.monotonic,
        refiner: Refiner | None = None,
    ) -> None:
        self._topology = topology
        self._config = config
        self._hosts = hosts
        self._send = send
        self._on_event = on_event
        self._on_plan = on_plan
        self._on_overview = on_overview
        self._current = current
        self._begun = begun
        self._limits = list(limits)
        self._clock = clock
        self._detector = Detector(config.detector, topology.length, ring=topology.chunks > 1)
        self._estimator = Estimator(config.detector, topology.length, topology.chunks)
        self._reports: dict[int, dict[int, IterationReport]] = {}
        self._newest = 0
        self._version = 0
        self._profiled = False
        self._considered = 0  # iteration in which the running plan was last compared with another
        self._owed: list[Finding] = []
        self._vote: _Vote | None = None
        self._refiner = _exact_refiner(config) if refiner is None else refiner
        self._refinement: tuple[Refinement, Profile, Plan] | None = None
        self._committed: tuple[Profile, Plan] | None = None
        self._complete = -1  # newest iteration that all ranks have reported
        self._last_first = 0  # first iteration of the newest committed plan
        self._stopped = False
        self._inbox: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # --- thread

    def start(self) -> None:
        thread = threading.Thread(target=self._serve, name="adaptra-coordinator", daemon=True)
        with told("the coordinator's thread cannot be started", TransportError):
            thread.start()
        self._thread = thread

    def post(self, rank: int, message: dict[str, Any]) -> None:
        """Takes a message from a rank; returns at once."""
        self._inbox.put((rank, message))

    def close(self, last: int = -1, patience_s: float = 2.0, deadline_s: float = 5.0) -> None:
        """Ends the thread; before that, waits up to `patience_s` for the ranks' reports of iteration `last`, which may
        still be on their way when this rank has finished."""
        until = time.monotonic() + patience_s
        while self._thread is not None and not self._stopped and self._complete < last and time.monotonic() < until:
            time.sleep(0.01)
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(deadline_s)
        self._end_refinement()

    def _serve(self) -> None:
        while True:
            item: tuple[int, dict[str, Any]] | None = (self._topology.rank, {})
            try:
                item = self._inbox.get(timeout=1.0)
            except queue.Empty:
                pass  # nothing new: only the clock has moved
            if item is None:
                return
            try:
                self.handle(*item)
                self.tick()
            except Exception:
                # training goes on with the plan it has: it needs nothing of this thread
                logger.exception("coordinator: replanning is off from now on; training goes on with the running plan")
                self._give_up()

    def _give_up(self) -> None:
        """Nothing is planned any more, and nobody is left waiting for a verdict."""
        self._stopped = True
        if self._vote is not None:
            self._verdict(commit=False)
            self._vote = None
        self._end_refinement()

    # --- logic

    def handle(self, rank: int, message: dict[str, Any]) -> None:
        """One message of a rank: a report, or an answer to a proposal."""
        if self._stopped:
            return
        kind = message.get("type")
        if kind == "report":
            try:
                report = IterationReport.from_json(message["report"])
            except ValueError as error:
                logger.warning("coordinator: a report of rank %d is refused: %s", rank, error)
                return
            self._take(report)
        elif kind == "answer":
            self._answer(rank, int(message["version"]), bool(message["ok"]), int(message["begun"]))

    def tick(self) -> None:
        """Gives up a vote that has lasted too long; proposes what the exact solver has found."""
        if self._stopped:
            return
        self._take_refinement()
        if self._vote is not None and self._clock() > self._vote.deadline:
            missing = sorted(set(range(self._topology.world_size)) - set(self._vote.answers))
            logger.warning("coordinator: plan v%d is dropped, ranks %s do not answer", self._vote.version, missing)
            self._verdict(commit=False)
            self._events(self._vote.findings, "none: ranks did not answer the proposal of a new plan")
            self._vote = None

    def _take(self, report: IterationReport) -> None:
        self._newest = max(self._newest, report.iteration)
        together = self._reports.setdefault(report.iteration, {})
        together[report.rank] = report
        if len(together) < self._topology.world_size:
            return
        del self._reports[report.iteration]
        for old in [i for i in self._reports if i < report.iteration]:
            del self._reports[old]
        self._on_overview(overview(list(together.values())))
        self._complete = report.iteration
        for pipeline in self._topology.pipelines:
            reports = [together[rank] for rank in pipeline]
            self._owed += self._detector.observe(reports)
            self._estimator.observe(reports)
        if self._vote is None:
            self._consider(report.iteration, report.microbatches)

    def _consider(self, iteration: int, microbatches: int) -> None:
        """Plans if something was found, when the profile is known for the first time, and every `REFRESH` iterations."""
        if not self._owed and self._profiled and iteration < self._considered + REFRESH:
            return
        profiles = [
            self._estimator.profile(microbatches, self._limits, replica)
            for replica in range(len(self._topology.pipelines))
        ]
        known = [profile for profile in profiles if profile is not None]
        findings, self._owed = self._owed, []
        if len(known) < len(profiles):
            self._events(findings, "none: the profile is not complete yet")
            return
        first_time, self._profiled = not self._profiled, True
        self._considered = iteration
        if self._config.schedule != "slack-adaptive":
            self._events(findings, f"none: schedule {self._config.schedule} does not adapt")
            return
        profile = merge_profiles(known)
        running = self._newest_plan(microbatches)
        before = simulate(running.schedule, profile).makespan_ms
        try:
            found = plan(profile, schedule=self._config.schedule, current=running)
        except PlanError as error:
            self._events(findings, f"none: no plan ({error})", before, before)
            return
        healed = any(finding.state == "healed" for finding in findings)
        gain = before / found.makespan_ms - 1 if found.makespan_ms else 0.0
        worth = WORTH if findings else REFRESH_WORTH
        if found.schedule == running.schedule or (gain < worth and not healed and not first_time):
            self._events(findings, "none: the running plan is within 1 % of the best", before, before)
            return
        self._offer(profile, found, findings, before, "newer profile")

    def _offer(self, profile: Profile, found: Plan, findings: list[Finding], before_ms: float, reason: str) -> None:
        """Opens the vote on a plan."""
        self._end_refinement()
        self._version += 1
        first, deadline = self._next_iteration(MARGIN), self._vote_deadline()
        self._propose(_Vote(self._version, profile, found, first, findings, before_ms, reason, 1, deadline))

    def _refine(self, profile: Profile, found: Plan) -> None:
        if self._refiner is not None and found.gap > REFINE_GAP and not found.optimal:
            self._refinement = (self._refiner(profile, found), profile, found)

    def _take_refinement(self) -> None:
        if self._refinement is None or self._vote is not None or not self._refinement[0].done:
            return
        refinement, profile, running = self._refinement
        self._refinement = None
        best = refinement.result()
        if best.makespan_ms < running.makespan_ms * (1 - REFINE_GAP):
            proof = "proven optimal" if best.optimal else f"within {best.gap:.1%} of the optimum"
            self._offer(profile, best, [], running.makespan_ms, f"refined, {proof}")

    def _end_refinement(self) -> None:
        if self._refinement is not None:
            self._refinement[0].cancel()
            self._refinement = None

    def _newest_plan(self, microbatches: int) -> Plan:
        """The newest committed plan, whether it has begun or not: what a new one would replace."""
        if self._committed is None:
            return self._current(microbatches)
        profile, newest = self._committed
        if profile.microbatches == microbatches:
            return newest
        return plan(replace(profile, microbatches=microbatches), schedule=self._config.schedule)

    def _next_iteration(self, margin: int) -> int:
        # after the newest committed plan's, so that plans begin in the order of their versions
        return max(self._newest + margin, self._begun() + margin, self._last_first + 1)

    def _vote_deadline(self) -> float:
        # well before the ranks' own patience with a missing verdict ends
        return self._clock() + min(VOTE_DEADLINE_S, self._config.transport.deadline_s / 4)

    def _propose(self, vote: _Vote) -> None:
        self._vote = vote
        self._broadcast(
            {
                "type": "propose",
                "version": vote.version,
                "first_iteration": vote.first_iteration,
                "profile": vote.profile.to_json(),
                "plan": vote.plan.to_json(),
            }
        )

    def _answer(self, rank: int, version: int, ok: bool, begun: int) -> None:
        vote = self._vote
        if vote is None or vote.version != version:
            return
        vote.answers[rank] = (ok, begun)
        self._newest = max(self._newest, begun)
        if len(vote.answers) < self._topology.world_size:
            return
        if all(ok for ok, _ in vote.answers.values()):
            self._verdict(commit=True)
            self._vote = None
            self._last_first = vote.first_iteration
            self._committed = (vote.profile, vote.plan)
            self._refine(vote.profile, vote.plan)
            reason = ", ".join(sorted({subject(finding) for finding in vote.findings})) or vote.reason
            self._on_plan(vote.version, vote.first_iteration, vote.plan, vote.profile, reason)
            warmups = " ".join(map(str, vote.plan.warmup))
            action = f"replan v{vote.version} from iteration {vote.first_iteration} (warm-ups {warmups})"
            self._events(vote.findings, action, vote.predicted_before_ms, vote.plan.makespan_ms, vote.version)
            return
        self._verdict(commit=False)
        self._vote = None
        if vote.tries >= MAX_TRIES:
            self._events(vote.findings, f"none: {vote.tries} proposals came too late", vote.predicted_before_ms)
            return
        # somebody had begun the first iteration already: the same plan again, later, under a new number
        self._version += 1
        margin = MARGIN * 2**vote.tries
        self._propose(
            replace(
                vote,
                version=self._version,
                first_iteration=self._next_iteration(margin),
                tries=vote.tries + 1,
                deadline=self._vote_deadline(),
                answers={},
            )
        )

    def _verdict(self, *, commit: bool) -> None:
        assert self._vote is not None
        self._broadcast({"type": "decide", "version": self._vote.version, "commit": commit})

    def _broadcast(self, message: dict[str, Any]) -> None:
        for rank in range(self._topology.world_size):
            self._send(rank, message)

    def _events(
        self,
        findings: Sequence[Finding],
        action: str,
        before_ms: float | None = None,
        after_ms: float | None = None,
        version: int | None = None,
    ) -> None:
        for finding in findings:
            ranks = tuple(self._topology.pipelines[finding.replica][stage] for stage in finding.stages)
            gain = before_ms / after_ms if before_ms is not None and after_ms else None
            self._on_event(
                StragglerEvent(
                    time_unix=time.time(),
                    kind=finding.kind,
                    state=finding.state,
                    replica=finding.replica,
                    link="-".join(map(str, finding.stages)) if finding.kind == "link" else None,
                    stages=finding.stages,
                    ranks=ranks,
                    hosts=tuple(self._hosts[rank] for rank in ranks),
                    since_iteration=finding.since_iteration,
                    found_iteration=finding.found_iteration,
                    delay_before_ms=finding.before_ms,
                    delay_after_ms=finding.after_ms,
                    action=action,
                    predicted_iteration_ms_before=before_ms,
                    predicted_iteration_ms_after=after_ms,
                    predicted_gain=gain,
                    plan_version=self._version if version is None else version,
                )
            )


def _exact_refiner(config: AdaptraConfig) -> Refiner | None:
    if config.refine_s <= 0 or importlib.util.find_spec("ortools") is None:
        return None
    return lambda profile, found: Refinement(profile, found, seconds=config.refine_s, workers=1)


def subject(finding: Finding) -> str:
    """`link 2-3 slow`, `stage 1 healed`."""
    return f"{finding.kind} {'-'.join(map(str, finding.stages))} {finding.state}"
