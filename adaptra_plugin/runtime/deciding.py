"""When a new plan is worth it. Nothing here waits, sends or keeps time: what is known goes in, and a plan or a reason comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptra_plugin.detect import Finding
from adaptra_plugin.runtime.merging import merge_profiles
from adaptra_plugin.schedule.names import SCHEDULES
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.simulator import simulate

WORTH = 0.01
"""A plan that is predicted to be shorter by less than this ratio does not replace the running one."""
REFRESH = 10
"""Iterations after which the running plan is compared with the best one for the newest profile, without any finding."""
REFRESH_WORTH = 0.03
"""... and replaced if that is predicted to be shorter by this ratio: estimates get better with time, and drift."""


@dataclass(frozen=True)
class Candidate:
    """A plan that is worth switching to.

    Attributes:
        profile: what it is made from.
        plan: for `profile.microbatches`.
        findings: that it answers; none: the profile has changed, or a better plan was found.
        before_ms: predicted iteration with the running plan.
        reason: for people, where there are no findings.
    """

    profile: Profile
    plan: Plan
    findings: Sequence[Finding]
    before_ms: float
    reason: str


class Decider:
    """Compares the running plan with the best one for what is known now.

    Args:
        schedule: as configured.
    """

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule
        self._profiled = False
        self._considered = 0  # iteration of the last comparison
        self.running_ms: float | None = None
        """Predicted iteration with the running plan, from the last `decide`; None: it did not come that far."""

    def is_due(self, iteration: int, findings: Sequence[Finding]) -> bool:
        """If something was found, until the profile is known, and every `REFRESH` iterations."""
        return bool(findings) or not self._profiled or iteration >= self._considered + REFRESH

    def decide(
        self,
        iteration: int,
        profiles: Callable[[], Sequence[Profile | None]],
        running: Callable[[], Plan],
        findings: Sequence[Finding],
    ) -> Candidate | str:
        """A better plan, or why there is none.

        Args:
            iteration: the newest one whose reports are complete.
            profiles: makes those of each replica; None: not known yet.
            running: makes the newest committed plan for the same number of microbatches.
            findings: what has changed.

        Raises:
            PlanError: a profile is refused, or the limits cannot be kept.
        """
        self.running_ms = None
        found_profiles = profiles()
        known = [profile for profile in found_profiles if profile is not None]
        if len(known) < len(found_profiles):
            return "the profile is not complete yet"
        first_time, self._profiled, self._considered = not self._profiled, True, iteration
        if not SCHEDULES[self.schedule].adapts:
            return f"schedule {self.schedule} does not adapt"
        profile, current = merge_profiles(known), running()
        now_ms = self.running_ms = simulate(current.schedule, profile).makespan_ms
        found = plan(profile, schedule=self.schedule, current=current)
        healed = any(finding.state == "healed" for finding in findings)
        gain = now_ms / found.makespan_ms - 1 if found.makespan_ms else 0.0
        worth = WORTH if findings else REFRESH_WORTH
        if found.schedule == current.schedule or (gain < worth and not healed and not first_time):
            return "the running plan is within 1 % of the best"
        return Candidate(profile, found, findings, now_ms, "newer profile")
