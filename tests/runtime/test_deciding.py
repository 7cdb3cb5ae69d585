"""When a new plan is worth it, without ranks, threads or clocks."""

from __future__ import annotations

import pytest

from adaptra_plugin.detect import Finding
from adaptra_plugin.runtime import deciding
from adaptra_plugin.runtime.deciding import Candidate, Decider
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile

STAGES = (StageProfile(10.0, 10.0, 6.0),) * 4


def profile(latency_ms):
    return Profile(8, STAGES, (LinkProfile(1, 2, latency_ms), LinkProfile(2, 1, latency_ms)))


HEALTHY, SLOW = profile(0.5), profile(30.0)
FOUND = [Finding("link", 0, (1, 2), "slow", 8, 9, 0.5, 30.0, 10.0)]


def decide(decider, profiles, running=HEALTHY, findings=(), iteration=5):
    return decider.decide(iteration, lambda: profiles, lambda: plan(running), list(findings))


def test_nothing_is_decided_before_every_pipeline_is_known():
    decider = Decider("slack-adaptive")
    assert decide(decider, [HEALTHY, None]) == "the profile is not complete yet"
    assert decider.running_ms is None and decider.is_due(6, []), "the next iteration may complete it"


def test_a_slow_link_is_worth_a_plan():
    decider = Decider("slack-adaptive")
    decide(decider, [HEALTHY])
    found = decide(decider, [SLOW], findings=FOUND)
    assert isinstance(found, Candidate) and found.profile == SLOW and found.findings == FOUND
    assert found.plan.makespan_ms < found.before_ms == decider.running_ms


def test_of_several_pipelines_the_slowest_link_counts():
    decider = Decider("slack-adaptive")
    decide(decider, [HEALTHY])
    found = decide(decider, [HEALTHY, SLOW], findings=FOUND)
    assert isinstance(found, Candidate) and found.plan == plan(SLOW, current=plan(HEALTHY))


def test_a_plan_that_is_best_already_stays_and_is_looked_at_again_later():
    decider = Decider("slack-adaptive")
    assert decide(decider, [SLOW], running=SLOW) == "the running plan is within 1 % of the best"
    assert not decider.is_due(5 + deciding.REFRESH - 1, []) and decider.is_due(5 + deciding.REFRESH, [])
    assert decider.is_due(6, FOUND)


@pytest.mark.parametrize("worth", [0.0, 10.0])
def test_without_a_finding_the_gain_must_be_larger(worth, monkeypatch):
    decider = Decider("slack-adaptive")
    decide(decider, [HEALTHY])
    monkeypatch.setattr(deciding, "REFRESH_WORTH", worth)
    assert isinstance(decide(decider, [SLOW]), Candidate) is (worth == 0.0)


def test_other_schedules_do_not_adapt():
    decider = Decider("zb-h1")
    assert decide(decider, [SLOW], findings=FOUND) == "schedule zb-h1 does not adapt"
    assert not decider.is_due(6, []), "and nobody asks in every iteration"
