"""The switch to a new plan: every rank switches at the same iteration, whatever the timing of messages."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import TransferTimeout
from adaptra_plugin.runtime.messages import Prepare
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.schedule.packing import PackedPlan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile

STAGES = (StageProfile(1.0, 1.0, 1.0),) * 3
PROFILE = Profile(microbatches=4, stages=STAGES)
SLOW = Profile(microbatches=4, stages=STAGES, links=(LinkProfile(1, 2, 3.0),))


def prepared(version, first, profile=SLOW):
    return Prepare(version=version, first_iteration=first, packed=PackedPlan(profile, plan(profile)))


def book(**kwargs):
    return PlanBook(PROFILE, "slack-adaptive", kwargs.pop("deadline_s", 5.0), **kwargs)


def test_switches_at_the_first_iteration_of_a_committed_plan():
    b = book()
    assert b.begin(0, 4) == (0, plan(PROFILE))
    assert b.prepare(prepared(1, 2))
    b.commit(1)
    assert b.begin(1, 4)[0] == 0
    assert b.begin(2, 4) == (1, plan(SLOW))


def test_a_plan_that_comes_too_late_is_declined():
    b = book()
    b.begin(5, 4)
    assert not b.prepare(prepared(1, 5))
    assert b.prepare(prepared(2, 6))


def test_an_aborted_plan_is_forgotten():
    b = book()
    b.prepare(prepared(1, 1))
    b.abort(1)
    assert b.begin(1, 4)[0] == 0


def test_a_new_plan_does_not_displace_a_committed_one_that_has_not_begun():
    b = book()
    b.prepare(prepared(1, 3))
    b.commit(1)
    b.prepare(prepared(2, 5, PROFILE))
    assert b.begin(3, 4)[0] == 1
    b.commit(2)
    assert b.begin(4, 4)[0] == 1
    assert b.begin(5, 4)[0] == 2


def test_the_first_iteration_waits_for_commit_or_abort():
    b = book()
    b.prepare(prepared(1, 1))
    threading.Timer(0.05, b.commit, (1,)).start()
    assert b.begin(1, 4)[0] == 1


def test_neither_commit_nor_abort_is_an_error_within_the_deadline():
    b = book(deadline_s=0.05)
    b.prepare(prepared(1, 1))
    with pytest.raises(TransferTimeout, match=r"neither commit nor abort of plan v1 for iteration 1 within .*rank 0"):
        b.begin(1, 4)


def test_failure_ends_the_wait():
    b = book()
    b.prepare(prepared(1, 1))
    threading.Timer(0.05, b.fail, (RuntimeError("peer lost"),)).start()
    with pytest.raises(RuntimeError, match="peer lost"):
        b.begin(1, 4)


def test_plans_for_other_numbers_of_microbatches_follow_the_current_profile():
    b = book()
    b.prepare(prepared(1, 1))
    b.commit(1)
    b.begin(1, 4)
    expected = plan(Profile(microbatches=7, stages=STAGES, links=SLOW.links))
    assert b.begin(2, 7) == (1, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_all_ranks_run_the_same_version_in_every_iteration(data):
    """A model of the protocol: messages to each rank arrive in order, but at any time relative to its iterations."""
    ranks = 3
    books = [book(deadline_s=0.0) for _ in range(ranks)]
    inbox: list[list] = [[] for _ in range(ranks)]
    iteration = [0] * ranks
    ran: list[dict[int, int]] = [{} for _ in range(ranks)]
    answers: dict[int, list[bool]] = {}
    version, open_vote, last_first = 0, None, 0
    for _ in range(data.draw(st.integers(20, 120))):
        move = data.draw(st.sampled_from(["deliver", "run", "prepare"]))
        rank = data.draw(st.integers(0, ranks - 1))
        if move == "prepare" and open_vote is None:
            version += 1
            first = max(max(iteration) + data.draw(st.integers(0, 3)), last_first + 1)
            open_vote = prepared(version, first)
            answers[version] = []
            for box in inbox:
                box.append(("prepare", open_vote))
        elif move == "deliver" and inbox[rank]:
            what, item = inbox[rank].pop(0)
            if what == "prepare":
                answers[item.version].append(books[rank].prepare(item))
                if len(answers[item.version]) == ranks:
                    ok = all(answers[item.version])
                    last_first = item.first_iteration if ok else last_first
                    open_vote = None
                    for box in inbox:
                        box.append(("commit" if ok else "abort", item.version))
            else:
                getattr(books[rank], what)(item)
        elif move == "run" and iteration[rank] <= min(iteration) + 1:
            try:
                ran[rank][iteration[rank]] = books[rank].begin(iteration[rank], 4)[0]
                iteration[rank] += 1
            except TransferTimeout:
                pass  # waits for commit or abort: tried again later
    for index in range(min(iteration)):
        assert len({ran[rank][index] for rank in range(ranks)}) == 1
