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
