"""Control messages that make no sense: refused with a sentence, and nobody's end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.runtime.messages import Lost, Message, Refused, Vote, check_plan, check_vote, peer_of, read
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.packing import PackedPlan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile, StageProfile
from tests.runtime.test_coordinator_trouble import JSON
from tests.runtime.test_session import start

TOPOLOGY = Topology.of(0, [[0, 1]])
PROFILE = Profile(4, (StageProfile(1.0, 1.0, 1.0),) * 2)
PREPARE = {
    "type": "prepare",
    "version": 1,
    "first_iteration": 3,
    "packed": PackedPlan(PROFILE, plan(PROFILE)).text,
}


def accepted(message: Any) -> Message:
    """What a message says. Raises ValueError with the sentence it is refused with."""
    found = read(message)
    if isinstance(found, Refused):
        raise ValueError(found.why)
    return found


def test_a_prepared_plan_is_read():
    prepared = accepted(PREPARE)
    check_plan(prepared, TOPOLOGY)
    assert (prepared.version, prepared.first_iteration, prepared.profile) == (1, 3, PROFILE)
    assert prepared.plan == plan(PROFILE)
    assert accepted(prepared.to_json()) == prepared
    assert prepared.to_json()["packed"] is prepared.to_json()["packed"], "packed once, whoever it is sent to"


OTHER = Profile(4, (StageProfile(1.0, 1.0, 1.0),) * 3)
SHORTER = Profile(3, (StageProfile(1.0, 1.0, 1.0),) * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_iteration": "3"}, "first_iteration: '3' is not a whole number"),
        ({"version": True}, "version: True is not a whole number"),
        (
            {"packed": PackedPlan(OTHER, plan(OTHER)).text},
            "a plan for 3 ranks .* the pipelines have 2 ranks",
        ),
        ({"packed": PackedPlan(PROFILE, plan(SHORTER)).text}, "a plan of 3 microbatches .* expected 4"),
        ({"packed": None}, "a packed plan is a NoneType"),
        ({"packed": "x"}, "a packed plan of 1 characters is not base64"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        check_plan(accepted({**PREPARE, **change}), TOPOLOGY)


@pytest.mark.parametrize("message", [{"version": "1"}, {"version": True}, {"version": -1}, {}])
@pytest.mark.parametrize("kind", ["commit", "abort"])
def test_commit_and_abort_name_a_version(kind, message):
    assert accepted({"type": kind, "version": 1}).version == 1
    with pytest.raises(ValueError, match=r"version: "):
        accepted({"type": kind, **message})


@pytest.mark.parametrize("ok", ["false", 1, None])
def test_a_vote_is_a_number_and_a_truth(ok):
    with pytest.raises(ValueError, match=r"ok: .* is neither true nor false"):
        accepted({"type": "vote", "version": 1, "ok": ok, "begun": 0})


@pytest.mark.parametrize("rank", [-1, 2, "1", None, [], 1.0])
def test_only_ranks_of_the_job_are_lost(rank):
    with pytest.raises(ValueError, match="rank: "):
        peer_of(accepted({"type": "lost", "rank": rank, "pp_rank": 0, "host": "n", "why": "gone"}), TOPOLOGY)
    lost = accepted({"type": "lost", "rank": 1, "host": "n", "why": "gone"})
    info = peer_of(lost, TOPOLOGY)
    assert (info.rank, info.pp_rank, info.host, lost.why) == (1, 1, "n", "gone")


def test_a_vote_from_the_far_future_is_none():
    vote = accepted({"type": "vote", "version": 2, "ok": False, "begun": -1})
    check_vote(vote, 0)
    assert (vote.version, vote.ok, vote.begun) == (2, False, -1)
    with pytest.raises(ValueError, match="begun: 900 is not a whole number from -1 to 20"):
        check_vote(Vote(version=2, ok=False, begun=900), 4)


def test_an_error_whose_text_is_not_utf8_is_told_all_the_same():
    lost = accepted(Lost(rank=1, host="n", why="no file \udcff").to_json())
    assert lost.why == "no file \\udcff"


KINDS = ["report", "vote", "rail", "show", "lost", "departed", "prepare", "commit", "abort", "nonsense"]
NAMES = [
    "rank",
    "pp_rank",
    "host",
    "why",
    "version",
    "commit",
    "event",
    "pipeline",
    "first_iteration",
    "packed",
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
            peer_of(accepted(message), session.topology)
        except ValueError:
            pass
        else:
            return  # that would be the truth
    session._router.receive(sender, message)
    session._router.receive(sender, fields.get("event"))
    assert session.failure is None
    assert session._endpoint.stats()["refused_connections"] == 0, "the control thread answers"


def test_a_message_is_complained_of_once(session, caplog):
    for _ in range(3):
        session._router.receive(5, {"type": "commit", "version": 1})
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "of rank 5" in r.getMessage()]
    assert warned == ["control message 'commit' of rank 5: ignored, only the coordinator may send it"]


def test_a_plan_that_is_not_understood_is_voted_against(session, monkeypatch):
    votes = []
    monkeypatch.setitem(session._router._takers, Vote, lambda rank, message: votes.append(message))
    session._router.receive(0, {"type": "prepare", "version": 4, "packed": "AAAA"})
    assert votes == [Vote(version=4, ok=False, begun=session._book.begun)]


def test_a_rail_that_cannot_be_reported_ends_nothing(session, monkeypatch, caplog):
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no words")

    monkeypatch.setattr(session._reporter, "message", broken)
    session._telemetry.rail(session._me, "tcp0", "paused", "it is silent")
    assert "which cannot be reported" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{}, {"event": 3}, {"pipeline": None}, {"pipeline": {"iteration": True}}, {"pipeline": {}}]
)
def test_what_rank_0_does_not_send_is_refused(wrong):
    assert isinstance(read({"type": "show", **wrong}), Refused)
