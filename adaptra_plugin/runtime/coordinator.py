"""The coordinator (world rank 0): collects reports, detects, decides on new plans, and leads the switch to them.

It works on a thread of its own, in large jobs in a process of its own (`coordinator_process`). Everything it needs is passed in,
so that tests run it without processes or sockets.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.detect import Finding, overview
from adaptra_plugin.errors import PlanError, TransportError
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.collecting import Collector, Measurements, Reports
from adaptra_plugin.runtime.deciding import Candidate, Decider
from adaptra_plugin.runtime.messages import Message, Refused, Report, Vote
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.runtime.refining import Refiner, Refining, exact_refiner
from adaptra_plugin.runtime.switching import Outcome, SwitchLeader
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.shortage import told

logger = logging.getLogger("adaptra")

MOST_FAILURES = 10
"""A part of the work that fails so often in a row is given up."""


class RunningPlans(Protocol):
    """What a coordinator needs to know of rank 0's `PlanBook`."""

    @property
    def begun(self) -> int:
        """The newest iteration that has begun there."""

    def plan_for(self, microbatches: int) -> Plan:
        """The running plan for a number of microbatches. Raises PlanError."""


class Coordinator:
    """Runs detection, planning and the switch to new plans, each of which may fail without harm to the others.

    Args:
        topology: of the job; this rank is world rank 0.
        config: the whole configuration.
        hosts: host name of every rank.
        send: `(rank, message)`, never blocks; one for the own rank is taken at once.
        on_event: receives every `StragglerEvent`.
        on_plan: `(version, first iteration, plan, profile, reason)` after a commit.
        on_overview: receives the metrics of the whole pipeline, once an iteration.
        book: plans of this rank.
        limits: activation limit per stage.
        refiner: starts the exact improvement of a plan; by default CP-SAT in a worker process, if OR-tools is installed.
    """

    def __init__(
        self,
        topology: Topology,
        config: AdaptraConfig,
        hosts: Mapping[int, str],
        *,
        send: Callable[[int, Message], None],
        on_event: Callable[[StragglerEvent], None],
        on_plan: Callable[[int, int, Plan, Profile, str], None],
        on_overview: Callable[[dict[str, Any]], None],
        book: RunningPlans,
        limits: Sequence[int | None],
        clock: Callable[[], float] = time.monotonic,
        refiner: Refiner | None = None,
    ) -> None:
        self._topology = topology
        self._schedule = config.schedule
        self._hosts = hosts
        self._send = send
        self._on_event = on_event
        self._on_plan = on_plan
        self._on_overview = on_overview
        self._book = book
        self._parts = Parts(self._part_event)
        self._collector = Collector(topology, self._parts, begun=lambda: book.begun)
        self._measurements = Measurements(config.detector, topology, limits)
        self._decider = Decider(config.schedule)
        self._leader = SwitchLeader(
            topology.world_size,
            config.transport.deadline_s,
            self._broadcast,
            newest=lambda: max(self._collector.newest, book.begun),
            own=lambda: book.begun,
            clock=clock,
        )
        self._refining = Refining(exact_refiner(config) if refiner is None else refiner, self._parts)
        self._committed: tuple[Profile, Plan] | None = None
        self._stopped = False
        self._inbox: queue.SimpleQueue[tuple[int, Report | Vote | Refused] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # --- thread

    def start(self) -> None:
        thread = threading.Thread(target=self._serve, name="adaptra-coordinator", daemon=True)
        with told("the coordinator's thread cannot be started", TransportError):
            thread.start()
        self._thread = thread

    def post(self, rank: int, message: Report | Vote | Refused) -> None:
        """Takes a message from a rank; returns at once."""
        self._inbox.put((rank, message))

    def close(self, last: int = -1, patience_s: float = 2.0, deadline_s: float = 5.0) -> None:
        """Ends the thread; before that, waits up to `patience_s` for the ranks' reports of iteration `last`, which may
        still be on their way when this rank has finished."""
        until = time.monotonic() + patience_s
        running = self._thread is not None and not self._stopped
        while running and self._collector.complete < last and time.monotonic() < until:
            time.sleep(0.01)
            running = not self._stopped
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(deadline_s)
        self._refining.end()

    def _serve(self) -> None:
        while True:
            try:
                found = self._inbox.get(timeout=1.0)
            except queue.Empty:
                self.turn(None)
                continue
            if found is None:
                return
            self.turn(found)

    def turn(self, found: tuple[int, Report | Vote | Refused] | None) -> None:
        """Takes one message of a rank (None: only the clock has moved). Never raises."""
        done = self._collector.complete
        try:
            if found is not None:
                self.handle(*found)
            self.tick()
        except Exception as error:  # noqa: BLE001  whatever it is, the next message may do
            self._parts.lost("replanning", "one message is passed over", error)
            if self._parts.failures("replanning") >= MOST_FAILURES:
                self._give_up("replanning")
        else:
            if self._collector.complete > done:  # messages that lead to nothing prove nothing
                self._parts.works("replanning")

    @property
    def complete(self) -> int:
        """The newest iteration that all ranks have reported."""
        return self._collector.complete

    def _give_up(self, part: str) -> None:
        """Nothing is planned any more, and nobody is left waiting for commit or abort. Training goes on with the plan it has:
        it needs nothing of this thread."""
        if self._stopped:
            return
        self._stopped = True
        self._leader.abort()
        self._refining.end()
        text = f"it has failed {MOST_FAILURES} times in a row and is given up; training goes on with the running plan"
        logger.error("coordinator: %s: %s", part, text)
        self._parts.tell(part, "lost", text)

    # --- logic

    def keep(self, schedule: str) -> None:
        """Before the first iteration: another schedule than configured is run."""
        self._schedule = schedule
        self._decider.schedule = schedule

    def handle(self, rank: int, message: Report | Vote | Refused) -> None:
        """One message of a rank."""
        if self._stopped or rank not in range(self._topology.world_size):
            return
        if isinstance(message, Report) or (isinstance(message, Refused) and message.kind is Report):
            together = self._collector.take(rank, message)
            if together is not None:
                self._observe(together)
        elif isinstance(message, Vote) or message.kind is Vote:
            self._conclude(self._leader.vote(rank, message))

    def tick(self) -> None:
        """Gives up a switch that has lasted too long; leads to what the exact solver has found."""
        if self._stopped:
            return
        self._conclude(self._leader.overdue())
        better = self._refining.take() if not self._leader.busy else None
        if better is not None:
            profile, running, best = better
            proof = "proven optimal" if best.optimal else f"within {best.gap:.1%} of the optimum"
            self._leader.lead(Candidate(profile, best, [], running.makespan_ms, f"refined, {proof}"))

    def _observe(self, together: Reports) -> None:
        """All reports of an iteration are there."""
        found = [report for report in together.values() if report is not None]
        if len(found) == len(together):
            with self._parts.guard("overview of the pipeline", "it is not reported"):
                self._on_overview(overview(found))
        with self._parts.guard("detection", "the iteration is passed over"):
            self._measurements.observe(together)
        if self._parts.failures("detection") >= MOST_FAILURES:
            self._give_up("detection")
        elif found and not self._leader.busy and self._decider.is_due(found[0].iteration, self._measurements.findings):
            self._decide(found[0].iteration, found[-1].microbatches)

    def _decide(self, iteration: int, microbatches: int) -> None:
        """Leads to a better plan, if there is one."""
        findings, self._measurements.findings = self._measurements.findings, []
        if self._parts.failures("planning") >= MOST_FAILURES:
            self._events(findings, f"none: planning has failed {MOST_FAILURES} times in a row and is given up")
            return
        try:
            decision = self._decider.decide(
                iteration,
                lambda: self._measurements.profiles(microbatches),
                lambda: self._newest_plan(microbatches),
                findings,
            )
            if isinstance(decision, Candidate):
                self._refining.end()
                self._leader.lead(decision)
        except PlanError as error:
            decision = f"no plan ({error})"
        except Exception as error:  # noqa: BLE001  whatever it is, events are due and the next profile may do
            self._parts.lost("planning", "the running plan stays", error)
            decision = f"no plan ({type(error).__name__}: {error})"
        else:
            self._parts.works("planning")
        if isinstance(decision, str):
            now_ms = self._decider.running_ms
            self._events(findings, f"none: {decision}", now_ms, now_ms)

    def _newest_plan(self, microbatches: int) -> Plan:
        """The newest committed plan, whether it has begun or not: what a new one would replace."""
        if self._committed is None:
            return self._book.plan_for(microbatches)
        profile, newest = self._committed
        if profile.microbatches == microbatches:
            return newest
        return plan(replace(profile, microbatches=microbatches), schedule=self._schedule)

    def _conclude(self, outcome: Outcome | None) -> None:
        """Tells what has become of a candidate, and has the exact solver improve a plan that runs."""
        if outcome is None:
            return
        candidate, prepared, before_ms = outcome.candidate, outcome.prepared, outcome.candidate.before_ms
        if outcome.failure is not None:
            self._events(candidate.findings, f"none: {outcome.failure}", before_ms)
            return
        self._committed = (candidate.profile, candidate.plan)
        version, first = prepared.version, prepared.first_iteration
        reason = ", ".join(sorted({f"{it.kind} {it.name} {it.state}" for it in candidate.findings})) or candidate.reason
        with self._parts.guard("report of plans", "the plan runs all the same"):
            self._on_plan(version, first, candidate.plan, candidate.profile, reason)
        warmups = " ".join(map(str, candidate.plan.warmup))
        action = f"replan v{version} from iteration {first} (warm-ups {warmups})"
        self._events(candidate.findings, action, before_ms, candidate.plan.makespan_ms)
        self._refining.begin(candidate.profile, candidate.plan)

    def _broadcast(self, message: Message) -> None:
        for rank in range(self._topology.world_size):
            # whatever one rank does not get, the others need: commit and abort hold for all
            with self._parts.guard(f"messages to rank {rank}", "it did not get one"):
                self._send(rank, message)

    def _events(
        self, findings: Sequence[Finding], action: str, before_ms: float | None = None, after_ms: float | None = None
    ) -> None:
        version = self._leader.version
        for finding in findings:
            ranks = [self._topology.pipelines[finding.replica][position] for position in finding.pp_ranks]
            with self._parts.guard("report of events", "one is not reported"):
                event = StragglerEvent.of_finding(
                    *(finding, ranks, self._hosts, before_ms, after_ms), action=action, plan_version=version
                )
                self._on_event(event)

    def _part_event(self, part: str, state: Any, text: str) -> None:
        rank, iteration = self._topology.rank, max(self._collector.complete, 0)
        common = {"iteration": iteration, "action": text, "plan_version": self._leader.version}
        self._on_event(StragglerEvent.of_part(part, state, rank, self._hosts[rank], **common))
