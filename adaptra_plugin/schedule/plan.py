"""What planning returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """A schedule and what is known of it.

    ``name`` of the schedule; predicted ``makespan_ms``; ``lower_bound_ms`` on the makespan of any schedule that keeps
    microbatches in order under the profile's limits; ``optimal``: proven that none is shorter; ``gap``:
    makespan over lower bound, minus one; ``planning_ms``: time spent; per rank ``warmup`` and ``peak_activations``.
    ``offloaded``, where planned with host offload: activations that each rank keeps on the host at its peak.
    Two plans are equal when all but their planning times are.
    """

    name: str
    schedule: Schedule
    makespan_ms: float
    lower_bound_ms: float
    optimal: bool
    gap: float
    planning_ms: float
    warmup: tuple[int, ...]
    peak_activations: tuple[int, ...]
    offloaded: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self.name, self.schedule, self.makespan_ms, self.lower_bound_ms, self.optimal, self.offloaded

    @property
    def ranks(self) -> list[list[str]]:
        """Printed actions of every rank."""
        return self.schedule.to_text()

    def facts(self) -> dict[str, Any]:
        """What is known of the schedule, as plain values."""
        out = {
            "schedule": self.name,
            "makespan_ms": self.makespan_ms,
            "lower_bound_ms": self.lower_bound_ms,
            "optimal": self.optimal,
            "gap": self.gap,
            "planning_ms": self.planning_ms,
        }
        if any(self.offloaded):
            out["offloaded"] = list(self.offloaded)
        return out

    def to_json(self) -> dict[str, Any]:
        """The PLAN format as a dict of plain values."""
        more = {"warmup": list(self.warmup), "peak_activations": list(self.peak_activations), "ranks": self.ranks}
        return {**self.facts(), **more}

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Reads the PLAN format. Raises PlanError for missing or wrong fields and for invalid schedules."""
        if not isinstance(data, Mapping):
            raise PlanError(f"plan is a {type(data).__name__}: expected an object")
        if not isinstance(data.get("ranks"), list) or not all(isinstance(r, list) for r in data["ranks"]):
            raise PlanError("plan.ranks: expected a list of actions per rank")
        return cls.of(Schedule.from_text([[str(a) for a in actions] for actions in data["ranks"]]), data)

    @classmethod
    def of(cls, schedule: Schedule, facts: object) -> Plan:
        """A schedule and what is known of it, see ``facts``. Raises PlanError for missing or wrong fields."""
        if not isinstance(facts, Mapping):
            raise PlanError(f"plan is a {type(facts).__name__}: expected an object")
        missing = [k for k in ("schedule", "makespan_ms", "lower_bound_ms", "optimal", "gap") if k not in facts]
        if missing:
            raise PlanError(f"plan lacks {', '.join(missing)}")
        try:
            return cls(
                str(facts["schedule"]),
                schedule,
                float(facts["makespan_ms"]),
                float(facts["lower_bound_ms"]),
                bool(facts["optimal"]),
                float(facts["gap"]),
                float(facts.get("planning_ms", 0.0)),
                schedule.warmup,
                schedule.peak_activations,
                tuple(int(count) for count in facts.get("offloaded", ())),
            )
        except (TypeError, ValueError) as error:
            raise PlanError(f"plan: {error}") from None
