"""Planning: from a profile to a schedule, the same on every machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.bound import bound_of
from adaptra_plugin.schedule.catalogue.one_f_one_b import one_f_one_b
from adaptra_plugin.schedule.catalogue.slack_adaptive import words_of
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.simulator import run
from adaptra_plugin.schedule.tables import NS, Tables, per_microbatch, tabulate


def _slack_adaptive(profile: Profile, tables: Tables) -> Schedule:
    return Schedule.from_words(words_of(tables)[1])


BUILDERS: dict[str, Callable[[Profile, Tables], Schedule]] = {
    "1f1b": lambda profile, tables: one_f_one_b(len(profile.stages), profile.microbatches),
    "zb-h1": lambda profile, tables: zb_h1(len(profile.stages), profile.microbatches),
    "slack-adaptive": _slack_adaptive,
}


def plan(profile: Profile, *, schedule: str = "slack-adaptive", current: Plan | None = None, seed: int = 0) -> Plan:
    """A plan for the profile: the named schedule, on delegated links.

    Raises PlanError for unknown names and for limits that the schedule cannot keep.
    """
    began = time.perf_counter()
    if schedule not in BUILDERS:
        raise PlanError(f"unknown schedule {schedule!r}: expected one of {', '.join(BUILDERS)}")
    tables = tabulate(profile)
    found = BUILDERS[schedule](profile, tables)
    short = [
        f"stage {rank} allows {int(tables.cap[rank])} activations, {schedule} needs {need}"
        for rank, need in enumerate(found.peak_activations)
        if need > tables.cap[rank]
    ]
    if short:
        raise PlanError("limits cannot be kept: " + "; ".join(short))
    makespan = int(run(found, tables, per_microbatch(tables, None), "delegated", "full")[1].max()) / NS
    bound = min(bound_of(tables).ms, makespan)
    return Plan(
        schedule,
        found,
        makespan,
        bound,
        makespan <= bound,
        makespan / bound - 1 if bound else 0.0,
        (time.perf_counter() - began) * 1e3,
        found.warmup,
        found.peak_activations,
    )
