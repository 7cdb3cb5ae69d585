"""Stock schedules: makespan and peak memory are the closed forms of their papers."""

from __future__ import annotations

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.simulator import simulate
from tests.schedule.helpers import even

SHAPES = [(2, 4), (4, 8), (4, 12), (8, 24)]


def run(name, profile):
    made = plan(profile, schedule=name)
    return made, simulate(made.schedule, profile)


@pytest.mark.parametrize(("stages", "n"), SHAPES)
def test_gpipe(stages, n):
    made, timeline = run("gpipe", even(stages, n, (2, 3, 1)))
    assert timeline.makespan_ms == (n + stages - 1) * 6
    assert made.peak_activations == (n,) * stages


@pytest.mark.parametrize(("stages", "n"), SHAPES)
def test_zb_h1_and_h2_with_equal_times(stages, n):
    h1, timeline1 = run("zb-h1", even(stages, n))
    h2, timeline2 = run("zb-h2", even(stages, n))
    assert h1.makespan_ms == h2.makespan_ms == 3 * n + stages - 1
    assert max(h1.peak_activations) == stages
    assert max(h2.peak_activations) == min(n, 2 * stages - 1)
    if n >= 2 * stages - 1:
        for rank in range(stages):  # no bubble between the first and the last action of any stage
            mine = [s for s in timeline2.spans if s.rank == rank]
            assert mine[-1].end_ms - mine[0].start_ms == 3 * n
    assert sum(timeline1.idle_ms.values()) == sum(timeline2.idle_ms.values())


@pytest.mark.parametrize(("ranks", "n"), SHAPES)
@pytest.mark.parametrize("virtual", [2, 3])
def test_interleaved_1f1b(ranks, n, virtual):
    made, timeline = run("interleaved-1f1b", even(ranks * virtual, n, (2, 3, 1), virtual=virtual))
    assert timeline.makespan_ms == (virtual * n + ranks - 1) * 6
    assert made.peak_activations == tuple(
        min(virtual * n, 2 * (ranks - r - 1) + (virtual - 1) * ranks + 1) for r in range(ranks)
    )


@pytest.mark.parametrize(("ranks", "n"), SHAPES)
def test_zb_v(ranks, n):
    made, timeline = run("zb-v", even(2 * ranks, n, virtual=2))
    assert made.schedule.stage_rank == (*range(ranks), *reversed(range(ranks)))
    assert timeline.makespan_ms == 6 * n + ranks - 1
    assert made.peak_activations == (2 * ranks,) * ranks
    for rank in range(ranks):
        mine = [s for s in timeline.spans if s.rank == rank]
        assert mine[-1].end_ms - mine[0].start_ms == 6 * n


@pytest.mark.parametrize(("stages", "n"), SHAPES)
def test_slack_adaptive_needs_no_more_than_zb_h1_where_nothing_is_slow(stages, n):
    ours, h1 = plan(even(stages, n)), plan(even(stages, n), schedule="zb-h1")
    assert ours.optimal
    assert ours.makespan_ms == h1.makespan_ms
    assert sum(ours.peak_activations) <= sum(h1.peak_activations)


@pytest.mark.parametrize(
    ("name", "profile", "message"),
    [
        ("interleaved-1f1b", even(4, 8), "two or more stages a rank"),
        ("zb-v", even(4, 8), "takes 2 stages a rank"),
        ("1f1b", even(4, 8, virtual=2), "takes 1 stages a rank"),
        ("interleaved-1f1b", even(4, 5, virtual=2), "not a multiple of 2"),
        ("zb-v", even(4, 3, virtual=2), "at least 4 microbatches"),
        ("gpipe", even(2, 8, cap=7), "stage 0 allows 7 activations, gpipe needs 8"),
        ("slack-adaptive", even(4, 8, cap=None, virtual=2), None),
    ],
)
def test_what_does_not_fit(name, profile, message):
    if message is None:
        assert plan(profile, schedule=name).schedule.stages == 4
        return
    with pytest.raises(PlanError, match=message):
        plan(profile, schedule=name)
