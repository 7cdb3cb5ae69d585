"""Plans: better than the stock schedules, within limits, the same every time."""

from __future__ import annotations

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.simulator import simulate
from tests.schedule.helpers import even


def test_a_slow_link_is_absorbed():
    profile = even(4, 12, (9, 10, 6), links=[(2, 3, 30.0)])
    ours, stock = plan(profile), plan(profile, schedule="1f1b")
    assert ours.makespan_ms < 0.6 * stock.makespan_ms
    assert ours.makespan_ms == simulate(ours.schedule, profile).makespan_ms
    assert ours.makespan_ms >= ours.lower_bound_ms


@pytest.mark.parametrize("latency", [0.0, 0.05])
def test_a_healthy_plan_beats_1f1b_and_keeps_small(latency):
    profile = even(4, 12, (9, 10, 6), links=[(i, i + 1, latency) for i in range(3)])
    ours = plan(profile)
    assert ours.makespan_ms <= plan(profile, schedule="1f1b").makespan_ms
    assert sum(ours.warmup) <= 16


def test_limits_are_kept():
    profile = even(4, 12, (9, 10, 6), links=[(1, 2, 40.0)], cap=5)
    assert max(plan(profile).peak_activations) <= 5


def test_limits_that_a_stock_schedule_cannot_keep_name_stage_and_need():
    with pytest.raises(PlanError, match="stage 0 allows 3 activations, 1f1b needs 4"):
        plan(even(4, 12, cap=3), schedule="1f1b")


def test_equal_profiles_get_equal_plans_and_plans_survive_json():
    profile = even(5, 10, (9, 10, 6), links=[(1, 2, 40.0)])
    first = plan(profile)
    assert plan(profile) == first
    again = Plan.from_json(first.to_json())
    assert again == first and again.planning_ms == first.planning_ms


def test_unknown_names_are_refused():
    with pytest.raises(PlanError, match="zb-h1"):
        plan(even(2, 4), schedule="fast")


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "object"), ({"ranks": "0F0"}, "ranks"), ({"ranks": [["0F0", "0B0"]]}, "lacks schedule")],
)
def test_wrong_plans_are_refused(data, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, True])
@pytest.mark.parametrize("schedule", ["zb-h1", "slack-adaptive"])
def test_seeds_out_of_range_are_refused(seed, schedule):
    with pytest.raises(PlanError, match=f"seed is {seed!r}: expected a whole number from 0 to 2147483647"):
        plan(even(2, 4), schedule=schedule, seed=seed)


def test_the_largest_seed_is_taken():
    profile = even(4, 8, (9, 10, 6), links=[(1, 2, 40.0)], cap=3)
    assert plan(profile, seed=2**31 - 1).makespan_ms >= plan(profile).lower_bound_ms


def test_offload_is_used_where_it_pays_and_only_there():
    profile = even(4, 12, (9, 10, 6), links=[(1, 2, 40.0)], cap=3)
    kept, free = plan(profile), plan(profile, offload_ms=0.0)
    cheap, dear = plan(profile, offload_ms=0.5), plan(profile, offload_ms=500.0)
    assert free.makespan_ms <= cheap.makespan_ms < kept.makespan_ms
    assert dear == kept and dear.offloaded == ()
    assert cheap.offloaded == tuple(max(0, peak - 3) for peak in cheap.peak_activations)
    assert max(cheap.offloaded) > 0
    assert Plan.from_json(cheap.to_json()) == cheap
    with pytest.raises(PlanError, match="offload_ms is -1"):
        plan(profile, offload_ms=-1.0)


def test_the_current_plan_stays_unless_another_is_better():
    slow = even(4, 12, (9, 10, 6), links=[(1, 2, 40.0)])
    made = plan(slow)
    a_little_slower = even(4, 12, (9, 10, 6), links=[(1, 2, 40.001)])
    assert plan(a_little_slower, current=made).schedule == made.schedule
    stale = plan(even(4, 12, (9, 10, 6)))
    assert plan(slow, current=stale).makespan_ms < simulate(stale.schedule, slow).makespan_ms
    other = plan(even(3, 12))
    assert plan(slow, current=other) == made  # of another pipeline: no use


def test_a_plan_does_not_collapse_when_latencies_are_a_little_higher():
    profile = even(6, 24, (9, 10, 6), links=[(3, 4, 30.0)])
    made = plan(profile)
    worse = simulate(made.schedule, even(6, 24, (9, 10, 6), links=[(3, 4, 33.0)])).makespan_ms
    assert worse <= 1.03 * made.makespan_ms


def test_transfers_that_fill_the_link_are_planned_for():
    profile = even(3, 8, (5, 5, 5), links=[(0, 1, 4.0, 14.0)])
    made = plan(profile)
    assert made.lower_bound_ms <= made.makespan_ms <= 1.05 * made.lower_bound_ms
    assert made.makespan_ms <= plan(profile, schedule="zb-h1").makespan_ms


@pytest.mark.parametrize("link", [(0, 1, 30.0), (1, 2, 30.0), (2, 3, 30.0)])
def test_interleaved_schedules_absorb_a_slow_link_too(link):
    profile = even(8, 12, (4.5, 5, 3), links=[link], virtual=2)
    ours = plan(profile, schedule="slack-adaptive-interleaved")
    stock = plan(profile, schedule="interleaved-1f1b")
    assert ours.makespan_ms < 0.6 * stock.makespan_ms
    assert ours.makespan_ms <= 1.05 * ours.lower_bound_ms
    healthy = even(8, 12, (4.5, 5, 3), virtual=2)
    assert plan(healthy).makespan_ms <= plan(healthy, schedule="interleaved-1f1b").makespan_ms
