"""Planning: from a profile to a schedule, the same on every machine."""

from __future__ import annotations

import time
from dataclasses import replace

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.bound import bound_of
from adaptra_plugin.schedule.names import SCHEDULES, Entry
from adaptra_plugin.schedule.offload import surplus, without_limits
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.simulator import run
from adaptra_plugin.schedule.tables import NS, Tables, per_microbatch, tabulate

TINY = 0.01
"""A latency below this share of a stage's time for one microbatch is not planned for: it is within the noise of its
own measurement, and slack for it would cost memory (one more warm-up a stage) to save less than it can be known."""

MOST_SEED = 2**31 - 1
"""Largest seed: what both the search kernels and CP-SAT take."""


def plan(
    profile: Profile,
    *,
    schedule: str = "slack-adaptive",
    current: Plan | None = None,
    seed: int = 0,
    offload_ms: float | None = None,
) -> Plan:
    """A plan for the profile, on delegated links: the named stock schedule, or the best slack-adaptive one found.

    Slack-adaptive: within the activation limits, the shortest makespan found; among equal ones (within 0.1 %) the one
    that suffers least from latencies 10 % higher, then as few activations as keep both; the ``current`` plan
    itself where the new one is no better in either. Deterministic: equal arguments give equal plans.
    With ``offload_ms``, what exceeds a limit may go to host memory at that price (see offload): the plan then says in
    ``offloaded`` how much, and its makespan includes the price.

    Raises PlanError for unknown names, for seeds that are not from 0 to MOST_SEED, for limits that the schedule cannot
    keep (which stage needs how many), and for schedules that do not fit the number of stages a rank.
    """
    began = time.perf_counter()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise PlanError(f"seed is {seed!r}: expected a whole number from 0 to {MOST_SEED}")
    entry = SCHEDULES.get(schedule)
    if entry is None:
        raise PlanError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if entry.adapts:
        tables = tabulate(profile)
        found = _adaptive(entry, profile, tables, current, seed)
    else:
        found = _stock(profile, schedule, entry)
        tables = tabulate(profile, found.stage_rank)
        _check_limits(schedule, found, tables)
    made = assess(schedule, found, tables, began=began)
    if offload_ms is None or not entry.adapts:
        return made
    other = _offloaded(profile, schedule, current, seed, offload_ms)
    return (
        replace(other, planning_ms=(time.perf_counter() - began) * 1e3)
        if other.makespan_ms < made.makespan_ms
        else made
    )


def _offloaded(profile: Profile, name: str, current: Plan | None, seed: int, offload_ms: float) -> Plan:
    """The best plan that may exceed limits: first all limited stages pay, then only those that made use of it."""
    paying = {n for n, stage in enumerate(profile.stages) if stage.max_activations is not None}
    made = plan(without_limits(profile, offload_ms, paying), schedule=name, current=current, seed=seed)
    over = {rank for rank, count in enumerate(surplus(profile, made.peak_activations)) if count}
    using = {n for n in paying if n % profile.ranks in over}
    tables = tabulate(without_limits(profile, offload_ms, using))
    bound = bound_of(tabulate(without_limits(profile, 0.0, paying))).ms  # of any plan, whatever it moves
    made = assess(name, made.schedule, tables, bound_ms=0.0)
    low = proven(bound, made.makespan_ms)
    return replace(
        made,
        lower_bound_ms=low,
        optimal=made.makespan_ms <= low,
        gap=made.makespan_ms / low - 1 if low else 0.0,
        offloaded=surplus(profile, made.peak_activations),
    )


def assess(name: str, schedule: Schedule, tables: Tables, *, bound_ms: float = 0.0, began: float | None = None) -> Plan:
    """The plan that a schedule makes on the profile of the tables; ``bound_ms`` is a better lower bound, if known.

    Raises PlanError for a schedule that is shorter than the lower bound, see ``proven``.
    """
    makespan = makespan_ns(schedule, tables) / NS
    bound = proven(max(bound_of(tables).ms, bound_ms), makespan)
    return Plan(
        name,
        schedule,
        makespan,
        bound,
        makespan <= bound,
        makespan / bound - 1 if bound else 0.0,
        0.0 if began is None else (time.perf_counter() - began) * 1e3,
        schedule.warmup,
        schedule.peak_activations,
    )


def proven(bound_ms: float, makespan_ms: float) -> float:
    """The lower bound for a plan of this makespan, at most the makespan.

    Only rounding (1 ns) is evened out. Raises PlanError for a bound above the makespan: taken as it is, or cut down to
    the makespan, it would declare a plan optimal that nobody has proven to be.
    """
    if round(bound_ms * NS) > round(makespan_ms * NS) + 1:
        raise PlanError(
            f"the lower bound of {bound_ms} ms is above the makespan of {makespan_ms} ms: the schedule breaks a limit "
            "that the bound counts on, or the bound is wrong; plan within the limits, or report the profile"
        )
    return min(bound_ms, makespan_ms)


def makespan_ns(schedule: Schedule, tables: Tables) -> int:
    """Makespan on delegated links, whole nanoseconds."""
    return int(run(schedule, tables, per_microbatch(tables, None), "delegated", "full")[1].max())


def _stock(profile: Profile, name: str, entry: Entry) -> Schedule:
    wanted, per_rank = entry.stages_per_rank, profile.virtual_stages
    if per_rank == 1 if wanted is None else per_rank != wanted:
        raise PlanError(
            f"{name} takes {wanted or 'two or more'} stages a rank, the profile has virtual_stages {per_rank}"
        )
    chunks = (per_rank,) if wanted is None else ()
    found: Schedule = entry.load()(profile.ranks, *chunks, profile.microbatches)
    return found


def _check_limits(name: str, schedule: Schedule, tables: Tables) -> None:
    one = len(tables.stage_rank) == len(tables.cap)
    short = [
        f"{'stage' if one else 'rank'} {rank} allows {int(tables.cap[rank])} activations, {name} needs {need}"
        for rank, need in enumerate(schedule.peak_activations)
        if need > tables.cap[rank]
    ]
    if short:
        raise PlanError("limits cannot be kept: " + "; ".join(short))


def _adaptive(entry: Entry, profile: Profile, tables: Tables, current: Plan | None, seed: int) -> Schedule:
    fits = (
        current is not None
        and current.schedule.stages == len(profile.stages)
        and current.schedule.microbatches == profile.microbatches
        and current.schedule.stage_rank == tuple(tables.stage_rank.tolist())
    )
    known = [current.schedule] if current is not None and fits else []
    found: Schedule = entry.load()(without_noise(tables), seed, known)
    if known and keeps(known[0], found, tables):
        return known[0]
    return found


def keeps(old: Schedule, new: Schedule, tables: Tables) -> bool:
    """Whether the old schedule may stay: within limits, at most 0.1 % longer than the new one, no more activations."""
    within = all(peak <= cap for peak, cap in zip(old.peak_activations, tables.cap, strict=True))
    return (
        within
        and makespan_ns(old, tables) * 1000 <= makespan_ns(new, tables) * 1001
        and sum(old.peak_activations) <= sum(new.peak_activations)
    )


def without_noise(tables: Tables) -> Tables:
    """The tables with tiny latencies set to zero, see TINY."""
    limit = int(tables.duration[:, :3].sum(axis=1).mean() * TINY)
    cost = tables.latency + tables.transfer
    small = cost <= limit
    return tables.with_links(tables.latency * ~small, tables.transfer * ~small)
