"""What runs next: the plan's order, or what a policy picks of the actions that are ready."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import PlanError
from adaptra_plugin.runtime.dispatch import IN_ORDER, buffers_needed, dispatch, forward_only
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile, StageProfile


def actions(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


class Last:
    """Picks the ready action that comes last in the plan; keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def next(self, ready: Sequence[Action]) -> Action:
        self.told.append(" ".join(map(str, ready)))
        return ready[-1]


PLAN = actions("1F0 1F1 1I0 1F2 1W0 1I1 1W1 1I2 1W2")


def test_in_order_is_the_plans_order_and_looks_at_nothing_else():
    def never(action: Action) -> bool:
        raise AssertionError("nobody has asked")

    assert list(dispatch(PLAN, never, IN_ORDER)) == PLAN


def test_a_policy_is_told_what_is_ready():
    """The inputs of 1I0 and 1I1 are there, and those of 1F2 and 1I2 never come."""
    policy = Last()
    came = set(actions("1F0 1F1 1I0 1I1 1W0 1W1 1W2"))
    ran = list(dispatch(PLAN, came.__contains__, policy))
    assert policy.told == ["1F0", "1F1 1I0", "1F1 1W0", "1F1", "1F2 1I1", "1F2 1W1", "1F2", "1I2", "1W2"]
    assert " ".join(map(str, ran)) == "1F0 1I0 1W0 1F1 1I1 1W1 1F2 1I2 1W2"


def test_what_has_not_come_is_not_ready_unless_it_is_the_plans_next():
    ready = []

    class Watching:
        def next(self, found: Sequence[Action]) -> Action:
            ready.append((len(found), [str(action) for action in found]))
            return found[0]

    assert list(dispatch(PLAN, lambda action: action.kind is Kind.BACKWARD_WEIGHT, Watching())) == PLAN
    assert ready[2] == (1, ["1I0"]) and ready[3] == (2, ["1F2", "1W0"])


def test_what_cannot_run_is_refused():
    class Wild:
        def next(self, ready: Sequence[Action]) -> Action:
            return Action(1, Kind.BACKWARD_INPUT, 1)

    with pytest.raises(PlanError, match="1I1 cannot run now: 1F0 can"):
        list(dispatch(PLAN, lambda action: True, Wild()))


def test_evaluations_run_ahead_too():
    forwards = forward_only([1], 4, 2)
    assert list(dispatch(forwards, lambda action: True, Last())) == list(forwards), "microbatches keep their order"


PROFILES = st.builds(
    lambda stages, chunks, microbatches: Profile(
        microbatches, (StageProfile(1.0, 1.0, 0.7),) * (stages * chunks), virtual_stages=chunks
    ),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(profile=PROFILES, rank=st.integers(0, 3), seed=st.integers(0, 1 << 20), fused=st.booleans())
def test_whatever_is_picked_results_stay_the_same_and_no_more_is_held(profile, rank, seed, fused):
    name = "1f1b" if fused and profile.virtual_stages == 1 else None
    found = plan(profile, **({"schedule": name} if name else {}))
    planned = found.schedule.ranks[rank % profile.ranks]
    rng = random.Random(seed)

    class Random:
        def next(self, ready: Sequence[Action]) -> Action:
            return rng.choice(list(ready))

    came: set[Action] = set()

    def arrived(action: Action) -> bool:
        if rng.random() < 0.5:
            came.add(action)
        return action in came

    ran = list(dispatch(planned, arrived, Random()))
    assert sorted(ran) == sorted(planned)
    for stage in {action.stage for action in planned}:
        for kinds in ("F", "IB", "WB"):
            order = [a.microbatch for a in ran if a.stage == stage and a.kind.value in kinds]
            assert order == [a.microbatch for a in planned if a.stage == stage and a.kind.value in kinds]
        for microbatch in range(profile.microbatches):
            steps = "".join(a.kind.value for a in ran if (a.stage, a.microbatch) == (stage, microbatch))
            assert steps in ("FIW", "FB")
    assert buffers_needed(ran) <= buffers_needed(planned)
    assert held(ran) <= held(planned)


def held(order: Sequence[Action]) -> int:
    """Microbatches whose activations are kept, at the most."""
    now, most = 0, 0
    for action in order:
        now += (action.kind is Kind.FORWARD) - (action.kind.value in "WB")
        most = max(most, now)
    return most
