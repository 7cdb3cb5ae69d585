"""The switch to a new plan, in two phases: both sides of it.

Every rank prepares the plan: it stores it and votes yes if it has not begun the first iteration yet. Commit or abort follows
when every rank has voted. A rank that reaches the first iteration of a plan it has prepared waits for that: the only wait, and
only if the votes took longer than the margin. So every rank of the job switches at the same iteration, or none does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from adaptra_plugin.errors import TransferTimeout
from adaptra_plugin.runtime.deciding import Candidate
from adaptra_plugin.runtime.messages import Abort, Commit, Message, Prepare, Refused, Vote, check_plan, check_vote
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.packing import PackedPlan
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile

logger = logging.getLogger("adaptra")

MARGIN = 2
"""Iterations between the newest one known to have begun and the first one of a new plan."""
MAX_TRIES = 6
"""How often one plan is prepared, each time with twice the margin of the time before, until all ranks can still take part."""
VOTE_DEADLINE_S = 30.0
"""Longest time (s) the ranks may take to vote."""


class PlanBook:
    """A rank's side: the plans it knows. Thread-safe: messages arrive on another thread than iterations begin on.

    Args:
        profile: for the initial plan (version 0).
        schedule: name of the schedule to plan (`"slack-adaptive"`, ...).
        deadline_s: longest wait for commit or abort.
    """

    def __init__(
        self, profile: Profile, schedule: str, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._condition = threading.Condition()
        self._schedule = schedule
        self._deadline_s = deadline_s
        self._clock = clock
        self._version = 0
        self._profile = profile
        self._cache: dict[int, Plan] = {}
        self._pending: list[Prepare] = []  # in the order of their first iterations
        self._committed: set[int] = set()
        self._begun = -1
        self._failure: Exception | None = None

    @property
    def version(self) -> int:
        return self._version

    @property
    def begun(self) -> int:
        """The newest iteration that has begun."""
        return self._begun

    def keep(self, schedule: str) -> None:
        """Before the first iteration: a schedule is run whatever it holds, as the host would."""
        with self._condition:
            stages = tuple(replace(stage, max_activations=None) for stage in self._profile.stages)
            self._schedule, self._profile, self._cache = schedule, replace(self._profile, stages=stages), {}

    def prepare(self, prepared: Prepare) -> bool:
        """Stores a plan. True if this rank can still run it from its first iteration on.

        An earlier plan that is committed but has not begun stays in force until the later one begins.
        """
        with self._condition:
            if prepared.first_iteration <= self._begun:
                return False
            self._pending.append(prepared)
            return True

    def vote(self, message: Prepare | Refused, topology: Topology) -> Vote:
        """Prepares the plan of a message. Whatever is wrong with it, the others wait for the vote.

        Raises:
            ValueError: it does not even say which version it is.
        """
        if message.version is None:
            raise ValueError(message.why)
        try:
            if isinstance(message, Refused):
                raise ValueError(message.why)
            check_plan(message, topology)
            ok = self.prepare(message)
        except Exception as error:  # noqa: BLE001  whatever it is
            logger.warning("plan v%d is refused: %s", message.version, error)
            ok = False
        return Vote(version=message.version, ok=ok, begun=self.begun)

    def commit(self, version: int) -> None:
        """The prepared plan will run."""
        with self._condition:
            self._committed.add(version)
            self._condition.notify_all()

    def abort(self, version: int) -> None:
        """The prepared plan is forgotten."""
        with self._condition:
            self._pending = [prepared for prepared in self._pending if prepared.version != version]
            self._condition.notify_all()

    def fail(self, error: Exception) -> None:
        """Whoever waits for commit or abort gets `error`."""
        with self._condition:
            self._failure = error
            self._condition.notify_all()

    def begin(self, iteration: int, microbatches: int) -> tuple[int, Plan]:
        """Version and plan of `iteration`, which begins now.

        Raises:
            TransferTimeout: neither commit nor abort of a prepared plan came within the deadline.
        """
        with self._condition:
            until = self._clock() + self._deadline_s
            while self._pending and self._pending[0].first_iteration <= iteration:
                due = self._pending[0]
                if due.version in self._committed:
                    self._switch(due)
                    continue
                if self._failure is not None:
                    raise self._failure
                left = until - self._clock()
                if left <= 0:
                    raise TransferTimeout(
                        f"neither commit nor abort of plan v{due.version} for iteration {iteration} within "
                        f"{self._deadline_s:.0f} s: the coordinator (rank 0) does not answer"
                    )
                self._condition.wait(min(left, 1.0))
            self._begun = max(self._begun, iteration)
            version = self._version
        return version, self.plan_for(microbatches)

    def plan_for(self, microbatches: int) -> Plan:
        """The current profile's plan for a number of microbatches.

        Raises:
            PlanError: the limits cannot be kept with so many microbatches.
        """
        with self._condition:
            profile, cache = self._profile, self._cache
            found = cache.get(microbatches)
        if found is None:
            # outside of the lock: the control thread must be able to store a plan meanwhile. The cache belongs to the
            # profile: if a switch comes in between, the result is kept with the old one and forgotten.
            found = plan(replace(profile, microbatches=microbatches), schedule=self._schedule)
            cache[microbatches] = found
        return found

    def _switch(self, prepared: Prepare) -> None:
        self._version = prepared.version
        self._profile = prepared.profile
        self._cache = {prepared.profile.microbatches: prepared.plan}
        self._pending.remove(prepared)
        self._committed.discard(prepared.version)


@dataclass
class _Round:
    """A prepared plan that waits for the ranks' votes."""

    candidate: Candidate
    prepared: Prepare
    tries: int
    deadline: float
    votes: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What has become of a candidate.

    Attributes:
        prepared: what the ranks were sent last.
        failure: why no rank switches; None: all do.
    """

    candidate: Candidate
    prepared: Prepare
    failure: str | None = None


class SwitchLeader:
    """The coordinator's side: at most one plan at a time is prepared, voted on, and committed or aborted. One thread.

    Args:
        ranks: of the job.
        deadline_s: how long ranks wait for commit or abort; votes may take a quarter of it.
        broadcast: sends a message to every rank; never raises.
        newest: the newest iteration that is known to have begun on any rank.
        own: the newest iteration that has begun on this rank, by which votes are judged.
    """

    def __init__(
        self,
        ranks: int,
        deadline_s: float,
        broadcast: Callable[[Message], None],
        newest: Callable[[], int],
        own: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks = ranks
        self._patience_s = min(VOTE_DEADLINE_S, deadline_s / 4)  # well before the ranks' own patience ends
        self._broadcast = broadcast
        self._newest = newest
        self._own = own
        self._clock = clock
        self._round: _Round | None = None
        self._begun = 0  # newest iteration in any vote
        self._last_first = 0  # first iteration of the newest committed plan
        self.version = 0
        """Of the plan that was prepared last."""

    @property
    def busy(self) -> bool:
        return self._round is not None

    def lead(self, candidate: Candidate, tries: int = 1) -> None:
        """Has all ranks prepare a plan."""
        self.version += 1
        margin = MARGIN * 2 ** (tries - 1)
        # after the newest committed plan's, so that plans begin in the order of their versions
        first = max(self._begun + margin, self._newest() + margin, self._last_first + 1)
        packed = PackedPlan(candidate.profile, candidate.plan)
        prepared = Prepare(version=self.version, first_iteration=first, packed=packed)
        self._round = _Round(candidate, prepared, tries, self._clock() + self._patience_s)
        self._broadcast(prepared)

    def vote(self, rank: int, message: Vote | Refused) -> Outcome | None:
        """Counts a vote; one that makes no sense is a no. The outcome if it is the last one and decides."""
        held = self._round
        try:
            if isinstance(message, Refused):
                raise ValueError(message.why)
            check_vote(message, self._own())
            version, ok, begun = message.version, message.ok, message.begun
        except ValueError as error:
            logger.warning("coordinator: a vote of rank %d is not understood, and counts as no: %s", rank, error)
            version, ok, begun = self.version, False, -1
        if held is None or version != self.version:
            return None
        self._begun = max(self._begun, begun)
        held.votes[rank] = ok
        if len(held.votes) < self._ranks:
            return None
        if all(held.votes.values()):
            self._end(Commit(version=version))
            self._last_first = held.prepared.first_iteration
            return Outcome(held.candidate, held.prepared)
        self.abort()
        if held.tries >= MAX_TRIES:
            return Outcome(held.candidate, held.prepared, f"{held.tries} tries to switch came too late")
        # somebody had begun the first iteration already: the same plan again, later, under a new number
        self.lead(held.candidate, held.tries + 1)
        return None

    def overdue(self) -> Outcome | None:
        """Aborts a plan whose votes have taken too long."""
        held = self._round
        if held is None or self._clock() <= held.deadline:
            return None
        missing = sorted(set(range(self._ranks)) - set(held.votes))
        logger.warning("coordinator: plan v%d is dropped, ranks %s do not vote", self.version, missing)
        self.abort()
        return Outcome(held.candidate, held.prepared, "ranks did not vote on a new plan")

    def abort(self) -> None:
        """No rank is left waiting."""
        if self._round is not None:
            self._end(Abort(version=self.version))

    def _end(self, message: Commit | Abort) -> None:
        self._round = None  # here before anywhere else
        self._broadcast(message)
