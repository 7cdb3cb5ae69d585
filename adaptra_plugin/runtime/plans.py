"""A rank's side of the agreement: which plan runs in which iteration.

Two phases. A proposal (version, profile, first iteration) is stored and answered with yes if this rank has not begun that
iteration. The verdict (commit or abort) follows when every rank has answered. A rank that reaches the first iteration
of a proposal it has said yes to, waits for the verdict: the only wait, and only if the answers took longer than the margin.
So every rank of the job switches at the same iteration, or none does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from adaptra_plugin.errors import TransferTimeout
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile


@dataclass(frozen=True)
class Proposal:
    """A plan to switch to.

    Attributes:
        version: increases with every proposal.
        profile: what the plan is made from; plans for other numbers of microbatches are computed from it, the same on every rank.
        plan: for `profile.microbatches`.
        first_iteration: the first iteration to run it.
    """

    version: int
    profile: Profile
    plan: Plan
    first_iteration: int


class PlanBook:
    """The plans a rank knows. Thread-safe: proposals arrive on another thread than iterations begin on.

    Args:
        profile: for the initial plan (version 0).
        schedule: name of the schedule to plan (`"slack-adaptive"`, ...).
        deadline_s: longest wait for a verdict.
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
        self._pending: list[Proposal] = []
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

    def propose(self, proposal: Proposal) -> bool:
        """Stores a proposal. True if this rank can still run it from its first iteration on.

        An earlier proposal that is committed but has not begun stays in force until the later one begins.
        """
        with self._condition:
            if proposal.first_iteration <= self._begun:
                return False
            self._pending.append(proposal)
            return True

    def decide(self, version: int, commit: bool) -> None:
        """The verdict on a proposal."""
        with self._condition:
            if commit:
                self._committed.add(version)
            else:
                self._pending = [proposal for proposal in self._pending if proposal.version != version]
            self._condition.notify_all()

    def fail(self, error: Exception) -> None:
        """Whoever waits for a verdict gets `error`."""
        with self._condition:
            self._failure = error
            self._condition.notify_all()

    def begin(self, iteration: int, microbatches: int) -> tuple[int, Plan]:
        """Version and plan of `iteration`, which begins now.

        Raises:
            TransferTimeout: no verdict on a proposal within the deadline.
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
                        f"no verdict on plan v{due.version} for iteration {iteration} within "
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
            # outside of the lock: the proxy's thread must be able to store a proposal meanwhile. The cache belongs to the
            # profile: if a switch comes in between, the result is kept with the old one and forgotten.
            found = plan(replace(profile, microbatches=microbatches), schedule=self._schedule)
            cache[microbatches] = found
        return found

    def _switch(self, proposal: Proposal) -> None:
        self._version = proposal.version
        self._profile = proposal.profile
        self._cache = {proposal.profile.microbatches: proposal.plan}
        self._pending.remove(proposal)
        self._committed.discard(proposal.version)
