"""Exact refinement in its worker process: proves, improves, can be cancelled, and says what went wrong."""

from __future__ import annotations

import time

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import assess, plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.refine import Refinement, refine
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.tables import tabulate
from tests.schedule.helpers import even

pytest.importorskip("ortools")

UNEVEN = Profile(
    6,
    (StageProfile(5, 6, 3, 2), StageProfile(6, 7, 4, 3), StageProfile(4, 6, 5, 2)),
    (LinkProfile(1, 2, 11.0),),
)


def test_a_bad_plan_becomes_the_proven_optimum():
    serial = Schedule.from_text([[f"{s}{k}{m}" for m in range(6) for k in "FIW"] for s in range(3)])
    bad = assess("slack-adaptive", serial, tabulate(UNEVEN))
    best = refine(UNEVEN, bad, seconds=30)
    assert best.optimal and best.gap == 0.0
    assert best.makespan_ms == best.lower_bound_ms
    assert best.makespan_ms <= plan(UNEVEN).makespan_ms < bad.makespan_ms
    assert all(p <= s.max_activations for p, s in zip(best.peak_activations, UNEVEN.stages, strict=True))
    assert refine(UNEVEN, bad, seconds=30) == best  # the same profile and seed, the same plan


def test_an_equally_short_schedule_is_no_reason_to_change():
    first = plan(UNEVEN)
    best = refine(UNEVEN, first, seconds=30)
    assert best.optimal
    if best.makespan_ms == first.makespan_ms:
        assert best.schedule == first.schedule


def test_several_stages_a_rank_share_their_limit():
    profile = even(4, 4, (2, 3, 1), links=[(0, 1, 9.0)], cap=2, virtual=2)
    best = refine(profile, plan(profile), seconds=30)
    assert best.makespan_ms <= plan(profile).makespan_ms
    assert max(best.peak_activations) <= 4


def test_what_is_optimal_already_starts_no_worker():
    first = plan(even(3, 6))
    assert first.optimal
    with Refinement(even(3, 6), first, seconds=5) as refinement:
        assert refinement.done
        assert refinement.result() is first


def test_cancelling_keeps_the_best_plan_so_far():
    hard = Profile(32, tuple(StageProfile(9.7 + s % 3, 11.3 - s % 2, 5.9 + s % 4, 4 + s % 5) for s in range(8)), ())
    first = plan(hard)
    assert not first.optimal
    refinement = Refinement(hard, first, seconds=300)
    assert not refinement.done
    time.sleep(0.3)
    refinement.cancel()
    assert refinement.done
    assert refinement.result().makespan_ms <= first.makespan_ms
    refinement.cancel()


def test_the_worker_s_error_is_raised():
    first = plan(UNEVEN)
    assert not first.optimal
    limited = Profile(
        UNEVEN.microbatches,
        tuple(StageProfile(s.forward_ms, s.backward_input_ms, s.backward_weight_ms, 1) for s in UNEVEN.stages),
        UNEVEN.links,
    )
    with pytest.raises(PlanError, match="activation limits"):  # the known makespan cannot be kept
        refine(limited, first, seconds=30)
    with pytest.raises(PlanError, match="above zero"):
        Refinement(UNEVEN, first, seconds=0)


def test_plans_with_equal_content_are_equal_whatever_they_took():
    first = plan(UNEVEN)
    other = Plan.from_json(first.to_json() | {"planning_ms": 1e6})
    assert other == first and hash(other) == hash(first)
