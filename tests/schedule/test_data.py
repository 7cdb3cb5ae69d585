"""Actions, profiles and schedules as data: printing, parsing, and every rule that refuses."""

from __future__ import annotations

import copy

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.simulator import simulate
from adaptra_plugin.schedule.tables import tabulate
from tests.schedule.helpers import even


@pytest.mark.parametrize("kind", list(Kind))
def test_actions_print_and_parse(kind):
    action = Action(12, kind, 34)
    assert str(action) == f"12{kind.value}34"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0x", "-1F0", "2 F 0"])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(PlanError, match="2F0"):
        Action.parse(text)


def test_profile_round_trip():
    profile = Profile(
        6,
        (StageProfile(1, 2.5, 3, 4), StageProfile(1, 2, 3), StageProfile(1, 2, 3), StageProfile(1, 1, 1)),
        (LinkProfile(0, 1, 5, 0.5), LinkProfile(1, 0, 7)),
        2,
    )
    assert Profile.from_json(profile.to_json()) == profile
    assert profile.ranks == 2


def test_a_link_holds_for_both_directions_unless_the_reverse_is_listed():
    profile = even(3, 4, links=[(0, 1, 5.0, 0.5), (1, 2, 3.0), (2, 1, 9.0)])
    assert (profile.link(1, 0).latency_ms, profile.link(1, 0).transfer_ms) == (5.0, 0.5)
    assert (profile.link(1, 2).latency_ms, profile.link(2, 1).latency_ms) == (3.0, 9.0)
    assert profile.link(0, 2).latency_ms == 0.0


STAGE = {"forward_ms": 1, "backward_input_ms": 1, "backward_weight_ms": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object"),
        ({"stages": [STAGE]}, "lacks microbatches"),
        ({"microbatches": 4, "stages": [STAGE], "link": []}, "unknown link"),
        ({"microbatches": 0, "stages": [STAGE]}, "microbatches is 0"),
        ({"microbatches": 2.5, "stages": [STAGE]}, "whole number"),
        ({"microbatches": 4, "stages": []}, "stages is empty"),
        ({"microbatches": 4, "stages": {}}, "expected a list"),
        ({"microbatches": 4, "stages": [STAGE | {"forward_ms": -1}]}, r"stages\[0\]: forward_ms is -1"),
        ({"microbatches": 4, "stages": [STAGE | {"forward_ms": float("nan")}]}, "finite"),
        ({"microbatches": 4, "stages": [STAGE | {"forward_ms": "1"}]}, "number of milliseconds"),
        ({"microbatches": 4, "stages": [STAGE | {"max_activations": 0}]}, "at least 1"),
        ({"microbatches": 4, "stages": [{"forward_ms": 1}]}, r"stages\[0\] lacks backward_input_ms"),
        ({"microbatches": 4, "stages": [STAGE] * 3, "virtual_stages": 2}, "multiple of virtual_stages"),
        ({"microbatches": 4, "stages": [STAGE] * 2, "links": [{"src": 0, "dst": 2, "latency_ms": 1}]}, "beyond"),
        ({"microbatches": 4, "stages": [STAGE] * 2, "links": [{"src": 0, "dst": 0, "latency_ms": 1}]}, "leads to"),
        ({"microbatches": 4, "stages": [STAGE] * 2, "links": [{"src": 0, "dst": 1, "latency_ms": 1}] * 2}, "twice"),
        ({"microbatches": 10**400, "stages": [STAGE]}, "at most 10000000 can be planned"),
        ({"microbatches": 4, "stages": [STAGE | {"forward_ms": 10**400}]}, "forward_ms is 1000"),
        ({"microbatches": 64, "stages": [STAGE | {"forward_ms": 1e8}]}, r"64 microbatches add up to 6.4e\+09 ms"),
        (
            {"microbatches": 9, "stages": [STAGE] * 2, "links": [{"src": 0, "dst": 1, "latency_ms": 1e8}]},
            r"add up to 1.8e\+09 ms, at most 1.13e\+09 ms",
        ),
    ],
)
def test_wrong_profiles_are_refused_with_the_place(data, message):
    with pytest.raises(PlanError, match=message):
        Profile.from_json(data)


def test_the_longest_times_that_are_accepted_can_be_planned():
    profile = even(4, 8, (8e6, 8e6, 8e6), links=[(1, 2, 1e7), (2, 3, 0.0, 1e7)], cap=3)
    made = plan(profile)
    assert made.lower_bound_ms <= made.makespan_ms == simulate(made.schedule, profile).makespan_ms


def test_the_limits_of_a_rank_add_up_and_are_never_dropped():
    kept = [StageProfile(1, 1, 1, cap) for cap in (3, 2, 4, 3)]
    assert tabulate(Profile(8, tuple(kept), (), 2)).cap.tolist() == [7, 5]
    mixed = Profile(8, (*kept[:3], StageProfile(1, 1, 1)), (), 2)
    message = "rank 1 mixes .*: stage 1 allows 2, stage 3 has no limit; .* give all of them one or none"
    with pytest.raises(PlanError, match=message):
        plan(mixed)
    huge = Profile(8, (StageProfile(1, 1, 1, 10**30),) * 4, (), 2)
    assert plan(huge).schedule == plan(even(4, 8, virtual=2)).schedule


def test_which_stages_share_a_limit_is_a_matter_of_placement():
    """In zb-v rank 0 holds the first and the last stage, in the default placement the first and the third."""
    stages = [StageProfile(1, 1, 1, cap) for cap in (9, None, None, 9)]
    profile = Profile(4, tuple(stages), (), 2)
    assert plan(profile, schedule="zb-v").peak_activations[0] <= 18
    with pytest.raises(PlanError, match="rank 0 mixes"):
        plan(profile)


def test_csv_round_trip():
    schedule = zb_h1(4, 6)
    assert Schedule.from_csv(schedule.to_csv()) == schedule
    assert schedule.to_csv().splitlines()[3].startswith("3F0,3I0,")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([["0F0", "0B0"], ["1F0", "1F1", "1B0", "1B1"]], "rank 0, step 2 .*F of microbatch 1 on stage 0 is missing"),
        ([["0F0", "0B0", "0F0"]], "rank 0, step 2 .*twice"),
        ([["0I0", "0F0", "0W0"]], "rank 0, step 0 .*before F"),
        ([["0F0", "0W0", "0I0"]], "rank 0, step 1 .*W before I"),
        ([["0F1", "0F0", "0B0", "0B1"]], "out of order: microbatch 0 is next"),
        ([["0F0", "0F1", "0I0", "0B1", "0W0"]], "fused backward while W of microbatch 0"),
        ([["0F0", "0I0"]], "W of microbatch 0 on stage 0 is missing"),
        ([["0F0", "1F0", "1B0", "0B0"], ["1F0", "1B0"]], "already lives on rank 0"),
        ([["0F0", "0B0"], []], "rank 1 has no actions"),
        ([["0F0", "0B0"], ["2F0", "2B0"]], "stage 1 of 3 lives on no rank"),
        ([[]], "no actions"),
        ([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]], "deadlock"),
    ],
)
def test_rules_of_schedules(ranks, message):
    with pytest.raises(PlanError, match=message):
        Schedule.from_text(ranks)


def test_a_deadlock_is_shown_in_the_grid():
    with pytest.raises(PlanError) as caught:
        Schedule.from_text([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]])
    assert "rank 0: 0F0 >0B0< 0F1 0B1" in str(caught.value)
    assert "rank 1: 1F0 >1F1< 1B0 1B1" in str(caught.value)


def test_actions_are_made_when_they_are_asked_for():
    profile = Profile(6, (StageProfile(1.0, 1.0, 1.0),) * 3)
    made = plan(profile).schedule
    again = Schedule.from_table(*made.table)
    assert again == made and hash(again) == hash(made) and again != plan(profile, schedule="gpipe").schedule
    assert "ranks" not in vars(again) and again.length == 3
    assert again.of_rank(1) == made.ranks[1] and "ranks" not in vars(again)
    assert again.ranks == made.ranks and again.of_rank(1) is again.ranks[1]
    assert copy.deepcopy(Schedule.from_table(*made.table)) == made
    with pytest.raises(AttributeError, match="rank"):
        made.rank  # noqa: B018
