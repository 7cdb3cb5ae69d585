"""Sentences that a person understands."""

from __future__ import annotations

import json
from dataclasses import replace

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
        stages=(1,),
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
        stages=(),
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
