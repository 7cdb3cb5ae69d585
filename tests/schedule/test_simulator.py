"""The simulator against closed forms and hand-computed cases."""

from __future__ import annotations

import pickle

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action
from adaptra_plugin.schedule.catalogue.one_f_one_b import one_f_one_b
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.simulator import simulate
from adaptra_plugin.schedule.timeline import Span, Timeline
from tests.schedule.helpers import even


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (4, 4), (4, 9), (8, 24)])
def test_1f1b_matches_its_closed_form(stages, microbatches):
    timeline = simulate(one_f_one_b(stages, microbatches), even(stages, microbatches, (2, 3, 1)))
    assert timeline.makespan_ms == (microbatches + stages - 1) * 6
    assert timeline.peak_activations == tuple(min(microbatches, stages - i) for i in range(stages))


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (8, 24)])
def test_zb_h1_matches_its_closed_form(stages, microbatches):
    timeline = simulate(zb_h1(stages, microbatches), even(stages, microbatches))
    assert timeline.makespan_ms == microbatches * 3 + (stages - 1) * 1
    assert max(timeline.peak_activations) == stages


PAIR = Schedule.from_text([["0F0", "0F1", "0I0", "0I1", "0W0", "0W1"], ["1F0", "1I0", "1F1", "1I1", "1W0", "1W1"]])


def spans(timeline):
    return {str(s.action): (s.start_ms, s.end_ms) for s in timeline.spans}


def test_latency_delays_and_transfers_overlap():
    timeline = simulate(PAIR, even(2, 2, links=[(0, 1, 10.0)]))
    at = spans(timeline)
    assert at["1F0"] == (11, 12) and at["1F1"] == (13, 14)  # both were on the way at once
    assert at["0I0"] == (23, 24) and at["0I1"] == (25, 26)
    assert timeline.makespan_ms == 28
    assert [str(a) for a in timeline.critical_path] == ["0F0", "1F0", "1I0", "1F1", "1I1", "0I1", "0W0", "0W1"]


def test_a_blocking_link_takes_one_transfer_at_a_time():
    at = spans(simulate(PAIR, even(2, 2, links=[(0, 1, 10.0)]), "blocking", duplex="full"))
    assert at["1F0"] == (11, 12) and at["1F1"] == (21, 22)
    assert at["0I0"] == (23, 24) and at["0I1"] == (33, 34)


def test_half_duplex_shares_the_link_between_directions():
    timeline = simulate(PAIR, even(2, 2, links=[(0, 1, 10.0)]), "blocking")
    at = spans(timeline)
    assert at["1F1"] == (21, 22)
    assert at["0I0"] == (31, 32)  # produced at 13, while the link still carries the activation of 1
    assert at["0I1"] == (41, 42)
    assert timeline.idle_ms["blocking"] > 0


def test_occupancy_counts_where_bandwidth_is_short():
    at = spans(simulate(PAIR, even(2, 2, links=[(0, 1, 10.0, 5.0)])))
    assert at["1F0"] == (16, 17)
    assert at["1F1"] == (21, 22)


def test_directions_may_differ():
    at = spans(simulate(PAIR, even(2, 2, links=[(0, 1, 10.0), (1, 0, 0.0)])))
    assert at["1F0"] == (11, 12) and at["0I0"] == (13, 14)


def test_idle_time_is_split_by_cause_and_complete():
    timeline = simulate(PAIR, even(2, 2, links=[(0, 1, 10.0)]), "blocking")
    busy = sum(s.end_ms - s.start_ms for s in timeline.spans)
    assert busy + sum(timeline.idle_ms.values()) == pytest.approx(2 * timeline.makespan_ms)
    first = next(i for i in timeline.idle if i.rank == 1)
    assert (first.start_ms, first.end_ms, first.cause) == (0, 1, "dependency")


def test_single_durations_can_be_replaced():
    slow = simulate(PAIR, even(2, 2), durations={Action.parse("1F0"): 5.0})
    assert spans(slow)["1F0"] == (1, 6)
    with pytest.raises(PlanError, match="7F0"):
        simulate(PAIR, even(2, 2), durations={Action.parse("7F0"): 5.0})


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="the profile 3"):
        simulate(PAIR, even(2, 3))
    with pytest.raises(PlanError, match="2 stages on 2 ranks"):
        simulate(PAIR, even(3, 2))
    with pytest.raises(PlanError, match="link model"):
        simulate(PAIR, even(2, 2), "magic")


def test_a_real_run_is_a_timeline_too():
    first, second = Action.parse("0F0"), Action.parse("0B0")
    timeline = Timeline.from_spans([Span(0, first, 105.0, 107.0), Span(0, second, 108.0, 110.0)])
    assert timeline.makespan_ms == 5.0
    assert timeline.peak_activations == (1,)
    assert timeline.idle_ms["dependency"] == 1.0
    with pytest.raises(PlanError, match="while 0F0 runs"):
        Timeline.from_spans([Span(0, first, 0.0, 2.0), Span(0, second, 1.0, 3.0)])


def test_simulated_timelines_are_timelines():
    """Equal, hashable, picklable, and the same as one made from their spans."""
    profile = even(2, 2, links=[(0, 1, 10.0)])
    made = simulate(PAIR, profile)
    assert made == simulate(PAIR, profile) and hash(made) == hash(simulate(PAIR, profile))
    copied = pickle.loads(pickle.dumps(made))  # noqa: S301  our own bytes
    assert copied == made
    plain = Timeline(made.ranks, made.spans, made.transfers, made.critical_path)
    assert plain.to_json() == made.to_json()
    assert plain.idle == made.idle
