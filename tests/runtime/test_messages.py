"""Control messages that make no sense: refused with a sentence, and nobody's end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.runtime.messages import answer_from, loss_from, proposal_from, verdict_from
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile, StageProfile
from tests.runtime.test_coordinator_trouble import JSON
from tests.runtime.test_session import start

TOPOLOGY = Topology.of(0, [[0, 1]])
PROFILE = Profile(4, (StageProfile(1.0, 1.0, 1.0),) * 2)
PROPOSAL = {
    "type": "propose",
    "version": 1,
    "first_iteration": 3,
    "profile": PROFILE.to_json(),
    "plan": plan(PROFILE).to_json(),
}


def test_a_proposal_is_read():
    proposal = proposal_from(PROPOSAL, TOPOLOGY)
    assert (proposal.version, proposal.first_iteration, proposal.profile) == (1, 3, PROFILE)
    assert proposal.plan == plan(PROFILE)


OTHER = Profile(4, (StageProfile(1.0, 1.0, 1.0),) * 3)
SHORTER = Profile(3, (StageProfile(1.0, 1.0, 1.0),) * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_iteration": "3"}, "first_iteration: '3' is not a whole number"),
        ({"version": True}, "version: True is not a whole number"),
        (
            {"profile": OTHER.to_json(), "plan": plan(OTHER).to_json()},
            "a plan for 3 ranks .* the pipelines have 2 ranks",
        ),
        ({"plan": plan(SHORTER).to_json()}, "a plan of 3 microbatches .* expected 4"),
        ({"plan": None}, "plan is a NoneType"),
        ({"profile": []}, "profile is a list"),
    ],
)
def test_proposals_that_cannot_be_run_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        proposal_from({**PROPOSAL, **change}, TOPOLOGY)


@pytest.mark.parametrize("message", [{"version": 1, "commit": "false"}, {"version": 1, "commit": 1}, {"commit": True}])
def test_a_verdict_is_a_number_and_a_truth(message):
    with pytest.raises(ValueError, match=r"version: None|commit: "):
        verdict_from(message)


@pytest.mark.parametrize("rank", [-1, 2, "1", None, [], 1.0])
def test_only_ranks_of_the_job_are_lost(rank):
    with pytest.raises(ValueError, match="rank: "):
        loss_from({"rank": rank, "pp_rank": 0, "host": "n", "why": "gone"}, TOPOLOGY)
    info, why = loss_from({"rank": 1, "host": "n", "why": "gone"}, TOPOLOGY)
    assert (info.rank, info.pp_rank, info.host, why) == (1, 1, "n", "gone")


def test_an_answer_from_the_far_future_is_none():
    assert answer_from({"version": 2, "ok": False, "begun": -1}, 0) == (2, False, -1)
    with pytest.raises(ValueError, match="begun: 900 is not a whole number from -1 to 20"):
        answer_from({"version": 2, "ok": False, "begun": 900}, 4)


KINDS = ["report", "answer", "rail", "show", "lost", "departed", "propose", "decide", "nonsense"]
NAMES = [
    "rank",
    "pp_rank",
    "host",
    "why",
    "version",
    "commit",
    "event",
    "pipeline",
    "report",
    "first_iteration",
    "plan",
]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = start(tmp_path_factory.mktemp("session"), torch.nn.Linear(4, 4))
    yield session
    session.close()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sender=st.integers(0, 3), kind=st.sampled_from(KINDS) | JSON, fields=st.dictionaries(st.sampled_from(NAMES), JSON)
)
def test_no_message_ends_a_session(session, sender, kind, fields):
    message: Any = {**fields, "type": kind}
    if kind in ("lost", "departed"):
        try:
            loss_from(message, session.topology)
        except ValueError:
            pass
        else:
            return  # that would be the truth
    session._control(sender, message)
    session._control(sender, fields.get("event"))
    assert session.failure is None
    assert session._endpoint.stats()["refused_connections"] == 0, "the control thread answers"


def test_a_message_is_complained_of_once(session, caplog):
    for _ in range(3):
        session._control(5, {"type": "decide", "version": 1, "commit": True})
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "of rank 5" in r.getMessage()]
    assert warned == ["control message 'decide' of rank 5: ignored, only the coordinator may send it"]


def test_a_proposal_that_is_not_understood_is_answered_with_no(session, monkeypatch):
    answers = []
    monkeypatch.setattr(session._coordinator, "post", lambda rank, message: answers.append(message))
    session._control(0, {"type": "propose", "version": 4, "plan": {"ranks": [[{}]]}})
    assert answers == [{"type": "answer", "version": 4, "ok": False, "begun": session._book.begun}]


def test_a_rail_that_cannot_be_reported_ends_nothing(session, monkeypatch, caplog):
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no words")

    monkeypatch.setattr(session._reporter, "message", broken)
    session._rail(session._me, "tcp0", "paused", "it is silent")
    assert "which cannot be reported" in caplog.text
