"""Small pipelines, solved by trying every order: no plan is shorter than the shortest, no lower bound longer.

The oracle shares nothing with the package: its own enumeration of orders, its own replay, whole milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.bound import lower_bound
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.planner import assess, plan, proven
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.tables import tabulate
from tests.schedule.helpers import even


@dataclass(frozen=True)
class Case:
    """Two stages: F, I and W of each, limits (0: none), latency and occupancy of the link there and back."""

    microbatches: int
    times: tuple[tuple[int, int, int], tuple[int, int, int]]
    caps: tuple[int, int]
    latency: tuple[int, int]
    transfer: tuple[int, int]

    @property
    def profile(self) -> Profile:
        stages = tuple(StageProfile(*t, cap or None) for t, cap in zip(self.times, self.caps, strict=True))
        there, back = zip(self.latency, self.transfer, strict=True)
        return Profile(self.microbatches, stages, (LinkProfile(0, 1, *there), LinkProfile(1, 0, *back)))


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    times = [tuple(draw.randint(0 if draw.random() < 0.2 else 1, 12) for _ in range(3)) for _ in range(2)]
    caps, latency = ((draw.choice(options), draw.choice(options)) for options in ((0, 0, 1, 2, 3), (0, 3, 9, 25)))
    transfer = (draw.choice((0, 0, 2, 14)), draw.choice((0, 0, 2, 14)))
    return Case(draw.choice((2, 3, 3)), tuple(times), caps, latency, transfer)


@cache
def orders(n: int, cap: int) -> tuple[str, ...]:
    """All orders of n F, I and W on one stage, microbatches in order, at most ``cap`` held (0: any number)."""
    found = []

    def extend(word: str, f: int, i: int, w: int) -> None:
        if w == n:
            found.append(word)
        if f < n and (not cap or f - w < cap):
            extend(word + "F", f + 1, i, w)
        if i < f:
            extend(word + "I", f, i + 1, w)
        if w < i:
            extend(word + "W", f, i, w + 1)

    extend("", 0, 0, 0)
    return tuple(found)


def replayed(case: Case, words: tuple[str, str]) -> int | None:
    """Makespan of two orders; None where they wait for each other."""
    arrived: list[list[int]] = [[], []]  # by sender: the forwards of stage 0, the gradients of stage 1
    at, clock, link_free = [0, 0], [0, 0], [0, 0]
    count = [{"F": 0, "I": 0, "W": 0}, {"F": 0, "I": 0, "W": 0}]
    moved = True
    while moved:
        moved = False
        for s in (0, 1):
            while at[s] < len(words[s]):
                kind = words[s][at[s]]
                n = count[s][kind]
                if (s, kind) in ((1, "F"), (0, "I")):
                    if n >= len(arrived[1 - s]):
                        break
                    clock[s] = max(clock[s], arrived[1 - s][n])
                clock[s] += case.times[s]["FIW".index(kind)]
                if (s, kind) in ((0, "F"), (1, "I")):
                    begin = max(clock[s], link_free[s])
                    link_free[s] = begin + case.transfer[s]
                    arrived[s].append(link_free[s] + case.latency[s])
                count[s][kind] += 1
                at[s] += 1
                moved = True
    return max(clock) if all(at[s] == len(words[s]) for s in (0, 1)) else None


def shortest(case: Case) -> int:
    made = [
        replayed(case, (first, second))
        for first in orders(case.microbatches, case.caps[0])
        for second in orders(case.microbatches, case.caps[1])
    ]
    return min(length for length in made if length is not None)


def test_the_oracle_tries_every_order():
    assert [len(orders(n, 0)) for n in (1, 2, 3)] == [1, 5, 42]  # three-dimensional Catalan numbers
    assert orders(3, 1) == ("FIW" * 3,)


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_is_shorter_than_the_optimum_and_no_bound_longer(seed):
    case = random_case(seed)
    best, made = shortest(case), plan(case.profile)
    assert lower_bound(case.profile).ms <= best <= made.makespan_ms
    assert made.lower_bound_ms <= best
    assert not made.optimal or made.makespan_ms == best


def test_most_plans_of_small_pipelines_are_the_optimum():
    cases = [random_case(seed) for seed in range(30)]
    assert sum(plan(case.profile).makespan_ms == shortest(case) for case in cases) >= 27


def test_a_bound_above_the_makespan_is_an_error_not_an_optimum():
    tables, schedule = tabulate(even(2, 3)), zb_h1(2, 3)
    makespan = assess("zb-h1", schedule, tables).makespan_ms
    with pytest.raises(PlanError, match=f"bound of {makespan + 1} ms is above the makespan of {makespan} ms"):
        assess("zb-h1", schedule, tables, bound_ms=makespan + 1)
    assert assess("zb-h1", schedule, tables, bound_ms=makespan).optimal
    assert proven(1.000001, 1.0) == 1.0  # one nanosecond: rounding
    with pytest.raises(PlanError):
        proven(1.000002, 1.0)
