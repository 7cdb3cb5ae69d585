"""What must hold for every profile."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.bound import bound_ns, bound_of
from adaptra_plugin.schedule.names import SCHEDULES
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import makespan_ns, plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.simulator import simulate
from adaptra_plugin.schedule.tables import NS, tabulate

times = st.one_of(st.integers(0, 20).map(float), st.floats(0, 20, allow_nan=False).map(lambda t: round(t, 3)))


MOSTLY_ONE = st.sampled_from([1, 1, 1, 2, 3])


@st.composite
def profiles(draw, most_stages=6, most_microbatches=12, virtual=MOSTLY_ONE, transfers=True):
    """Any profile: times of zero, limits from one on, links between any neighbours, some in one direction only."""
    per_rank = draw(virtual)
    ranks = draw(st.integers(1, max(1, most_stages // per_rank)))
    limited = draw(st.sets(st.integers(0, ranks - 1)))  # all stages of a rank have a limit, or none
    stages = tuple(
        StageProfile(draw(times), draw(times), draw(times), draw(st.integers(1, 8)) if s % ranks in limited else None)
        for s in range(ranks * per_rank)
    )
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True)) if pairs else []
    links = tuple(
        LinkProfile(a, b, draw(st.floats(0, 60).map(lambda t: round(t, 3))), draw(times) if transfers else 0.0)
        for a, b in chosen
    )
    return Profile(draw(st.integers(1, most_microbatches)), stages, links, per_rank)


ANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@ANY
@given(profiles())
def test_every_profile_gets_a_valid_plan_within_its_limits(profile):
    made = plan(profile)
    Schedule.from_text(made.ranks)  # validates again, from what is printed
    cap = tabulate(profile).cap
    assert all(peak <= limit for peak, limit in zip(made.peak_activations, cap, strict=True))
    assert made.peak_activations == simulate(made.schedule, profile).peak_activations
    tables = tabulate(profile)
    bound, found = bound_ns(tables)[0], makespan_ns(made.schedule, tables)
    assert bound <= found  # computed anew, in whole nanoseconds: the plan's own figures went through its checks
    assert made.lower_bound_ms == bound / NS and made.optimal == (bound == found)
    assert made.makespan_ms == pytest.approx(simulate(made.schedule, profile).makespan_ms)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@ANY
@given(profiles(), st.sampled_from(list(SCHEDULES)))
def test_no_schedule_beats_the_lower_bound(profile, name):
    try:
        made = plan(profile, schedule=name)
    except PlanError as error:
        assert "lower bound" not in str(error)
        return  # does not fit this profile, and said so
    tables = tabulate(profile, made.schedule.stage_rank)
    assert makespan_ns(made.schedule, tables) >= bound_ns(tables)[0]
    for model in ("delegated", "blocking"):
        for duplex in ("full", "half"):
            timeline = simulate(made.schedule, profile, model, duplex=duplex)
            assert timeline.makespan_ms >= bound_of(tables).ms
            busy = sum(s.end_ms - s.start_ms for s in timeline.spans)
            total = timeline.ranks * timeline.makespan_ms
            assert busy + sum(timeline.idle_ms.values()) == pytest.approx(total, abs=1e-6)
            first = timeline.critical_path[0]
            assert min(s.start_ms for s in timeline.spans if s.action == first) == 0


@ANY
@given(profiles(virtual=st.just(1)))
def test_a_blocking_link_is_never_faster(profile):
    made = plan(profile)
    free = simulate(made.schedule, profile).makespan_ms
    full = simulate(made.schedule, profile, "blocking", duplex="full").makespan_ms
    assert free <= full + 1e-6


@ANY
@given(profiles(virtual=st.just(1)))
def test_the_current_plan_is_only_given_up_for_a_better_one(profile):
    made = plan(profile)
    again = plan(profile, current=made)
    if again.schedule != made.schedule:
        shorter = again.makespan_ms < made.makespan_ms / 1.001
        assert shorter or sum(again.peak_activations) < sum(made.peak_activations)


SMALL = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
small = profiles(most_stages=3, most_microbatches=4, virtual=st.just(1), transfers=False)


def optimum(profile):
    """Proven optimum in nanoseconds, and the heuristic's makespan."""
    exact = pytest.importorskip("adaptra_plugin.schedule.exact")
    pytest.importorskip("ortools")
    first = plan(profile)
    tables = tabulate(profile)
    known = makespan_ns(first.schedule, tables)
    if first.optimal:
        return known, known
    solution = exact.solve_exactly(tables, first.schedule, known, 20.0, workers=1)
    assert solution.optimal
    return solution.bound, known


@SMALL
@given(small)
def test_more_memory_never_makes_the_optimum_longer(profile):
    best, found = optimum(profile)
    assert best <= found
    more = tuple(replace(s, max_activations=s.max_activations and s.max_activations + 1) for s in profile.stages)
    assert optimum(replace(profile, stages=more))[0] <= best


@SMALL
@given(small)
def test_more_delay_never_makes_the_optimum_shorter(profile):
    slower = tuple(replace(k, latency_ms=k.latency_ms + 7) for k in profile.links)
    assert optimum(replace(profile, links=slower))[0] >= optimum(profile)[0]
