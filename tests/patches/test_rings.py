"""A plan with more in flight than the rings hold runs through, with stock results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adaptra_plugin.runtime import starting
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.schedule.profile import LinkProfile
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import HIDDEN, SEQUENCE, assert_same, train

import_deepspeed()
pytestmark = pytest.mark.multiprocess

MICRO = 512
MICROBATCHES = 32
MESSAGE_BYTES = MICRO * SEQUENCE * HIDDEN * 4
LATENCY_MS = 100.0
"""What the plan is made for, with computations of 1 ms; the link itself is fast, so nothing slows the first stage."""
FULL = {
    "transport": {"ring_mib": 1, "connections_per_direction": 1, "deadline_s": 10.0},
    "detector": {"enabled": False},
}


def planned_for_a_slow_link(profile: Any, *args: Any) -> PlanBook:
    links = tuple(LinkProfile(src, dst, LATENCY_MS) for src, dst in ((0, 1), (1, 0)))
    return PlanBook(replace(profile, links=links), *args)


def both(rank: int, config: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    starting.PlanBook = planned_for_a_slow_link
    stats: list[dict[str, Any]] = []

    def during(engine: Any, step: int) -> None:
        stats.append(engine.adaptra._endpoint.stats()["peers"][1 - rank]["directions"])

    stock = train(config, None, steps, stages=2)
    ours = train(config, FULL, steps, stages=2, during=during)
    assert_same(stock, ours)
    return {"actions": ours["actions"], "stats": stats[-1]}


def test_more_warm_ups_than_the_rings_hold():
    first, second = run_ranks(both, 2, {"train_micro_batch_size_per_gpu": MICRO}, [MICROBATCHES] * 3, timeout=60.0)
    warm_ups = [action[1] for action in first["actions"]].index("I")
    holds = 2 << 20  # both directions: what is in flight lies in the sender's ring
    assert warm_ups * MESSAGE_BYTES > holds, "the plan has more in flight than fits"
    gradients = first["stats"]["gradient"]["received"]
    assert gradients["messages"] == 3 * MICROBATCHES
    assert 0 < gradients["drained_early"] < gradients["messages"]
    assert second["stats"]["gradient"]["sent"]["full"] > 0
