"""The paper's analysis, on numbers worked out by hand, and against the simulator."""

from __future__ import annotations

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.analysis import (
    adapted_warmup,
    cascades,
    delay_cost_ms,
    describe,
    initial_warmup,
    slackness,
    tolerated_ms,
)
from adaptra_plugin.schedule.bound import lower_bound
from adaptra_plugin.schedule.catalogue.zb_h1 import deferred
from adaptra_plugin.schedule.profile import Profile, StageProfile
from adaptra_plugin.schedule.simulator import simulate
from tests.schedule.helpers import even


def test_slackness_and_lemma_1():
    assert slackness([6, 5, 2, 1]) == (1, 3, 1)
    with pytest.raises(PlanError, match="warm-up 3 of stage 1 exceeds 2"):
        slackness([2, 3, 1])


def test_equation_1_gives_the_tolerated_delay():
    profile = even(3, 12, (2, 4, 1))
    assert tolerated_ms(profile, [5, 2, 1]) == (6.0, 0.0)  # (3 * 6 - 6) / 2 and (1 * 6 - 6) / 2
    assert cascades(even(3, 12, (2, 4, 1), links=[(0, 1, 6.0), (1, 2, 0.5)]), [5, 2, 1]) == (1,)
    lines = describe(even(3, 12, (2, 4, 1), links=[(0, 1, 6.0), (1, 2, 0.5)]), [5, 2, 1])
    assert lines[0].endswith("absorbed") and lines[1].endswith("cascades")


def test_theorem_1_against_the_simulator():
    """A tolerated delay costs about itself, whatever the number of microbatches; above, the cost grows with them."""

    def cost(slack, delay, n):
        warm = [slack + 1, 1]
        made = deferred(warm, [0, 0], n)
        return simulate(made, even(2, n, links=[(0, 1, delay)])).makespan_ms - simulate(made, even(2, n)).makespan_ms

    assert cost(4, 3.0, 16) == cost(4, 3.0, 64)
    assert cost(1, 9.0, 64) > 3 * cost(1, 9.0, 16)
    assert delay_cost_ms(3.0, 4, 1.0, 64) == 3.0
    assert delay_cost_ms(9.0, 1, 1.0, 64) == 64 * 9 / 2
    with pytest.raises(PlanError, match="negative"):
        delay_cost_ms(1.0, -1, 1.0, 4)


def test_algorithm_1_spreads_the_slack_larger_first():
    assert initial_warmup(4, 24, 4) == (4, 3, 2, 1)
    assert initial_warmup(4, 24, 9) == (9, 6, 3, 1)
    assert initial_warmup(4, 5, 9) == (5, 3, 2, 1)
    assert initial_warmup(1, 5, 3) == (3,)
    with pytest.raises(PlanError, match="at least one"):
        initial_warmup(4, 24, 0)


def test_algorithm_2_follows_the_delays():
    # (2 + 4 + 2 * 9) / 6 = 4 on the slow link, 1 elsewhere
    assert adapted_warmup(even(4, 24, (2, 4, 1), links=[(1, 2, 9.0)])) == (7, 6, 2, 1)
    # the slackness is limited to N - 2 S = 2
    assert adapted_warmup(even(4, 10, (2, 4, 1), links=[(1, 2, 9.0)])) == (5, 4, 2, 1)


@pytest.mark.parametrize(
    ("profile", "ms", "source"),
    [
        (even(4, 12), 39.0, "work of stage 3"),
        (Profile(4, (StageProfile(1, 1, 1), StageProfile(3, 3, 0))), 27.0, "drain of stage 1"),
        (even(2, 6, links=[(0, 1, 2.0, 20.0)]), 1 + 6 * 20 + 2 + 2 + 22 + 2, "occupancy of link 0-1"),
        (even(2, 2, links=[(0, 1, 50.0)]), 107.0, "round trip from stage 0 over link 0-1"),
        (even(2, 6, links=[(0, 1, 50.0)], cap=2), 316.0, "memory of stage 0 (2 activations)"),
    ],
)
def test_lower_bound_and_where_it_comes_from(profile, ms, source):
    bound = lower_bound(profile)
    assert bound.source == source
    assert bound.ms == ms
