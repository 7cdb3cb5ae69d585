"""The coordinator (world rank 0): collects reports, detects, plans, and leads the switch to a new plan.

It works on a thread of its own. Everything it needs is passed in, so that tests run it without processes or sockets.
"""

from __future__ import annotations

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
from adaptra_plugin.runtime.merging import merge_profiles
from adaptra_plugin.runtime.messages import answer_from, report_from
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.runtime.refining import Refiner, Refining, exact_refiner
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.names import SCHEDULES
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.simulator import simulate
from adaptra_plugin.shortage import told

logger = logging.getLogger("adaptra")

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
REFRESH_WORTH = 0.03
"""... and replaced if that is predicted to be shorter by this ratio: estimates get better with time, and drift."""
MOST_FAILURES = 10
"""A part of the work that fails so often in a row is given up."""
MOST_PENDING = 64
"""Iterations that may wait for the reports of some ranks."""


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
        self._detector = Detector(config.detector, topology.length, wraparound=topology.chunks > 1)
        self._estimator = Estimator(self._detector, topology.chunks)
        self._reports: dict[int, dict[int, IterationReport | None]] = {}  # None: one that was refused
        self._heard: dict[int, int] = {}  # newest iteration that each rank has reported
        self._newest = 0
        self._version = 0
        self._profiled = False
        self._considered = 0  # iteration in which the running plan was last compared with another
        self._owed: list[Finding] = []
        self._vote: _Vote | None = None
        self._parts = Parts(self._part_event)
        self._refining = Refining(exact_refiner(config) if refiner is None else refiner, self._parts)
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
        self._refining.end()

    def _serve(self) -> None:
        while True:
            item: tuple[int, dict[str, Any]] | None = (self._topology.rank, {})
            try:
                item = self._inbox.get(timeout=1.0)
            except queue.Empty:
                pass  # nothing new: only the clock has moved
            if item is None:
                return
            done = self._complete
            try:
                self.handle(*item)
                self.tick()
            except Exception as error:  # noqa: BLE001  whatever it is, the next message may do
                self._parts.lost("replanning", "one message is passed over", error)
                if self._parts.failures("replanning") >= MOST_FAILURES:
                    self._give_up("replanning")
            else:
                if self._complete > done:  # messages that lead to nothing prove nothing
                    self._parts.works("replanning")

    def _give_up(self, part: str) -> None:
        """Nothing is planned any more, and nobody is left waiting for a verdict. Training goes on with the plan it has: it
        needs nothing of this thread."""
        if self._stopped:
            return
        self._stopped = True
        if self._vote is not None:
            self._verdict(commit=False)
        self._refining.end()
        text = f"it has failed {MOST_FAILURES} times in a row and is given up; training goes on with the running plan"
        logger.error("coordinator: %s: %s", part, text)
        self._parts.tell(part, "lost", text)

    # --- logic

    def handle(self, rank: int, message: dict[str, Any]) -> None:
        """One message of a rank: a report, or an answer to a proposal."""
        if self._stopped or rank not in range(self._topology.world_size) or not isinstance(message, dict):
            return
        kind = message.get("type")
        if kind == "report":
            self._hear(rank, message)
        elif kind == "answer":
            try:
                self._answer(rank, *answer_from(message, self._begun()))
            except ValueError as error:
                logger.warning("coordinator: an answer of rank %d is not understood, and counts as no: %s", rank, error)
                if self._vote is not None:
                    self._answer(rank, self._vote.version, ok=False, begun=-1)

    def tick(self) -> None:
        """Gives up a vote that has lasted too long; proposes what the exact solver has found."""
        if self._stopped:
            return
        if self._vote is not None and self._clock() > self._vote.deadline:
            vote = self._vote
            missing = sorted(set(range(self._topology.world_size)) - set(vote.answers))
            logger.warning("coordinator: plan v%d is dropped, ranks %s do not answer", vote.version, missing)
            self._verdict(commit=False)
            self._events(vote.findings, "none: ranks did not answer the proposal of a new plan")
        better = self._refining.take() if self._vote is None else None
        if better is not None:
            profile, running, best = better
            proof = "proven optimal" if best.optimal else f"within {best.gap:.1%} of the optimum"
            self._offer(profile, best, [], running.makespan_ms, f"refined, {proof}")

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        """A report, or what should be one: then the other ranks' of the same iteration count without it."""
        part = f"measuring of rank {rank}"
        report, iteration = None, max(self._heard.get(rank, -1), self._complete) + 1
        try:
            report = report_from(message, rank, self._topology, self._begun())
        except ValueError as error:
            if not self._parts.is_lost(part):
                logger.warning("coordinator: a report of rank %d is refused: %s", rank, error)
            self._parts.lost(
                part, "its stage and the links into it are not judged, its reports are refused", str(error)
            )
        else:
            self._parts.works(part)
            iteration = report.iteration
        self._heard[rank] = max(self._heard.get(rank, -1), iteration)
        self._take(rank, iteration, report)

    def _take(self, rank: int, iteration: int, report: IterationReport | None) -> None:
        if iteration <= self._complete:
            return
        self._newest = max(self._newest, iteration)
        together = self._reports.setdefault(iteration, {})
        together[rank] = report or together.get(rank)
        while len(self._reports) > MOST_PENDING:
            del self._reports[min(self._reports)]
        if len(together) < self._topology.world_size:
            return
        for old in [i for i in self._reports if i <= iteration]:
            del self._reports[old]
        self._complete = iteration
        found = [report for report in together.values() if report is not None]
        if len(found) == len(together):
            with self._parts.guard("overview of the pipeline", "it is not reported"):
                self._on_overview(overview(found))
        with self._parts.guard("detection", "the iteration is passed over"):
            for pipeline in self._topology.pipelines:
                reports = [report for rank in pipeline if (report := together[rank]) is not None]
                findings = self._detector.observe(reports)
                self._owed += findings
                self._estimator.observe(reports, findings)
        if self._parts.failures("detection") >= MOST_FAILURES:
            self._give_up("detection")
        elif self._vote is None and found:
            self._consider(iteration, found[-1].microbatches)

    def _consider(self, iteration: int, microbatches: int) -> None:
        """Plans if something was found, when the profile is known for the first time, and every `REFRESH` iterations."""
        if not self._owed and self._profiled and iteration < self._considered + REFRESH:
            return
        findings, self._owed = self._owed, []
        if self._parts.failures("planning") >= MOST_FAILURES:
            self._events(findings, f"none: planning has failed {MOST_FAILURES} times in a row and is given up")
            return
        before: list[float] = []
        try:
            why = self._decide(iteration, microbatches, findings, before)
        except PlanError as error:
            why = f"no plan ({error})"
        except Exception as error:  # noqa: BLE001  whatever it is, events are due and the next profile may do
            self._parts.lost("planning", "the running plan stays", error)
            why = f"no plan ({type(error).__name__}: {error})"
        else:
            self._parts.works("planning")
        if why is not None:
            now = before[0] if before else None
            self._events(findings, f"none: {why}", now, now)

    def _decide(self, iteration: int, microbatches: int, findings: list[Finding], before: list[float]) -> str | None:
        """Offers a new plan, or says why not. `before` gets the predicted time (ms) of the running plan."""
        profiles = [
            self._estimator.profile(microbatches, self._limits, replica)
            for replica in range(len(self._topology.pipelines))
        ]
        known = [profile for profile in profiles if profile is not None]
        if len(known) < len(profiles):
            return "the profile is not complete yet"
        first_time, self._profiled = not self._profiled, True
        self._considered = iteration
        if not SCHEDULES[self._config.schedule].adapts:
            return f"schedule {self._config.schedule} does not adapt"
        profile = merge_profiles(known)
        running = self._newest_plan(microbatches)
        before.append(simulate(running.schedule, profile).makespan_ms)
        found = plan(profile, schedule=self._config.schedule, current=running)
        healed = any(finding.state == "healed" for finding in findings)
        gain = before[0] / found.makespan_ms - 1 if found.makespan_ms else 0.0
        worth = WORTH if findings else REFRESH_WORTH
        if found.schedule == running.schedule or (gain < worth and not healed and not first_time):
            return "the running plan is within 1 % of the best"
        self._offer(profile, found, findings, before[0], "newer profile")
        return None

    def _offer(self, profile: Profile, found: Plan, findings: list[Finding], before_ms: float, reason: str) -> None:
        """Opens the vote on a plan."""
        self._refining.end()
        self._version += 1
        first, deadline = self._next_iteration(MARGIN), self._vote_deadline()
        self._propose(_Vote(self._version, profile, found, first, findings, before_ms, reason, 1, deadline))

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
        message = {
            "type": "propose",
            "version": vote.version,
            "first_iteration": vote.first_iteration,
            "profile": vote.profile.to_json(),
            "plan": vote.plan.to_json(),
        }
        self._vote = vote
        self._broadcast(message)

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
            self._last_first = vote.first_iteration
            self._committed = (vote.profile, vote.plan)
            reason = ", ".join(sorted({f"{it.kind} {it.name} {it.state}" for it in vote.findings})) or vote.reason
            with self._parts.guard("report of plans", "the plan runs all the same"):
                self._on_plan(vote.version, vote.first_iteration, vote.plan, vote.profile, reason)
            warmups = " ".join(map(str, vote.plan.warmup))
            action = f"replan v{vote.version} from iteration {vote.first_iteration} (warm-ups {warmups})"
            self._events(vote.findings, action, vote.predicted_before_ms, vote.plan.makespan_ms, vote.version)
            self._refining.begin(vote.profile, vote.plan)
            return
        self._verdict(commit=False)
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
        """Ends the vote, here before anywhere else."""
        vote, self._vote = self._vote, None
        assert vote is not None
        self._broadcast({"type": "decide", "version": vote.version, "commit": commit})

    def _broadcast(self, message: dict[str, Any]) -> None:
        for rank in range(self._topology.world_size):
            # whatever one rank does not get, the others need: a verdict holds for all
            with self._parts.guard(f"messages to rank {rank}", "it did not get one"):
                self._send(rank, message)

    def _events(
        self,
        findings: Sequence[Finding],
        action: str,
        before_ms: float | None = None,
        after_ms: float | None = None,
        version: int | None = None,
    ) -> None:
        version = self._version if version is None else version
        for finding in findings:
            ranks = [self._topology.pipelines[finding.replica][position] for position in finding.pp_ranks]
            with self._parts.guard("report of events", "one is not reported"):
                event = StragglerEvent.of_finding(
                    *(finding, ranks, self._hosts, before_ms, after_ms), action=action, plan_version=version
                )
                self._on_event(event)

    def _part_event(self, part: str, state: Any, text: str) -> None:
        rank, iteration = self._topology.rank, max(self._complete, 0)
        common = {"iteration": iteration, "action": text, "plan_version": self._version}
        self._on_event(StragglerEvent.of_part(part, state, rank, self._hosts[rank], **common))
