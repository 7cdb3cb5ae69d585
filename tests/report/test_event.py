"""Sentences that a person understands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adaptra_plugin.detect import Finding
from adaptra_plugin.report import StragglerEvent
from tests.report.events import HEALED, SLOW


def test_a_slow_link() -> None:
    assert SLOW.sentence() == (
        "link 2-3 (rank 2 on n1 <-> rank 3 on n2) is slow since iteration 20: delay 0.4 -> 30.5 ms; "
        "new plan v2 (warm-ups 7 6 5 1); predicted 366 ms instead of 812 ms an iteration (2.22x)"
    )


def test_a_healed_link_in_another_replica() -> None:
    assert replace(HEALED, replica=1).sentence() == (
        "replica 1: link 2-3 (rank 2 on n1 <-> rank 3 on n2) healed in iteration 60: delay 30.5 -> 0.4 ms; "
        "back to plan v1"
    )


def test_a_slow_stage_that_no_plan_can_help() -> None:
    event = replace(
        SLOW,
        kind="stage",
        link=None,
        pp_ranks=(1,),
        ranks=(1,),
        hosts=("n1",),
        delay_before_ms=28.4,
        delay_after_ms=45.0,
        action="none: the plan in use is still the best",
        predicted_iteration_ms_before=400.0,
        predicted_iteration_ms_after=400.0,
        predicted_gain=1.0,
    )
    assert event.sentence() == (
        "stage 1 (rank 1 on n1) is slow since iteration 20: compute 28.4 -> 45.0 ms; "
        "none: the plan in use is still the best; predicted 400 ms an iteration"
    )


def test_a_lost_peer() -> None:
    event = replace(HEALED, kind="peer", state="lost", link=None, ranks=(3,), hosts=("n2",), action="training ends")
    assert event.sentence() == "rank 3 on n2 is lost since iteration 60; training ends"
    assert event.subject == "peer rank 3"


def test_json_is_plain_and_complete() -> None:
    data = json.loads(json.dumps(SLOW.to_json()))
    assert data["ranks"] == [2, 3] and data["hosts"] == ["n1", "n2"] and data["link"] == "2-3"
    assert set(data) == set(SLOW.__dataclass_fields__)


def test_a_part_that_fails_without_harm_to_training() -> None:
    event = replace(
        SLOW,
        kind="part",
        state="lost",
        part="exact solver",
        link=None,
        pp_ranks=(),
        ranks=(0,),
        hosts=("n0",),
        action="plans run as they are first made: the worker was killed by SIGKILL",
        predicted_iteration_ms_before=None,
        predicted_iteration_ms_after=None,
        predicted_gain=None,
    )
    assert event.sentence() == (
        "exact solver (rank 0 on n0) is lost since iteration 20; "
        "plans run as they are first made: the worker was killed by SIGKILL"
    )


def test_it_is_read_back_as_it_was_sent() -> None:
    assert StragglerEvent.from_json(json.loads(json.dumps(SLOW.to_json()))) == SLOW


@pytest.mark.parametrize(
    "wrong", [None, [], {}, {**SLOW.to_json(), "more": 1}, {**SLOW.to_json(), "ranks": 3, "hosts": 4, "kind": "peer"}]
)
def test_what_is_no_event_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="no event"):
        StragglerEvent.from_json(wrong)


def test_of_a_finding() -> None:
    finding = Finding("link", 1, (0, 1), "slow", 7, 9, 0.4, 30.0, 1.0)
    event = StragglerEvent.of_finding(
        finding, (2, 3), {2: "a", 3: "b"}, action="none", plan_version=4, before_ms=20.0, after_ms=10.0
    )
    assert (event.subject, event.replica, event.ranks, event.hosts) == ("link 0-1", 1, (2, 3), ("a", "b"))
    assert (event.since_iteration, event.found_iteration, event.predicted_gain, event.plan_version) == (7, 9, 2.0, 4)
    assert event.sentence().startswith("replica 1: link 0-1 (rank 2 on a <-> rank 3 on b) is slow since iteration 7")


def test_of_rails_peers_and_parts() -> None:
    common = {"iteration": 5, "action": "what is done", "plan_version": 2}
    rail = StragglerEvent.of_rail("tcp0", "lost", [(0, 4, "a"), (1, 5, "b")], replica=2, **common)
    assert rail.sentence() == (
        "replica 2: rail tcp0 of link 0-1 (rank 4 on a <-> rank 5 on b) is lost since iteration 5; what is done"
    )
    peer = StragglerEvent.of_peer(1, 5, "b", replica=0, **common)
    assert peer.sentence() == "rank 5 on b is lost since iteration 5; what is done"
    part = StragglerEvent.of_part("detection", "healed", 0, "a", **common)
    assert part.sentence() == "detection (rank 0 on a) healed in iteration 5; what is done"
