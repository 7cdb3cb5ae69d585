"""What fails beside training costs only itself: detection, events and replanning go on, and operators hear of it."""

from __future__ import annotations

import base64
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.errors import PlanError
from adaptra_plugin.runtime import coordinator as module
from adaptra_plugin.runtime import deciding
from adaptra_plugin.runtime.messages import Abort, Message, Refused, Report, read
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.schedule import planner
from tests.runtime.test_coordinator import CONFIG, World

SLOW = {(0, 1, 2): 30.0}


def parts(world: World) -> list[tuple[str, str]]:
    return [(event.part, event.state) for event in world.events if event.kind == "part"]


def findings(world: World) -> list[tuple[str, str]]:
    return [(event.subject, event.state) for event in world.events if event.kind != "part"]


def still_works(world: World, first: int = 20) -> None:
    """A slow link that comes now is found, told of, and leads to a plan that all ranks run."""
    known, plans = len(findings(world)), len(world.plans)
    for i in range(first, first + 10):
        world.iteration(i)
    ran = [world.iteration(i, SLOW) for i in range(first + 10, first + 16)]
    assert findings(world)[known:] == [("link 1-2", "slow")]
    assert len(world.plans) > plans and ran[-1] == [world.plans[-1][0]] * 4
    assert world.plans[-1][-1] == "link 1-2 slow"


@pytest.fixture
def gpipe(monkeypatch):
    """The heuristic answers with GPipe where nothing is slow, so that the solver has something to find."""

    def plan(profile, **more):
        slow = any(link.latency_ms > 10 for link in profile.links)
        return planner.plan(profile, **more) if slow else planner.plan(profile, schedule="gpipe")

    monkeypatch.setattr(deciding, "plan", plan)


def until(world: World, condition, deadline_s: float = 100.0) -> None:
    """The solver runs at the lowest priority: on a busy machine it comes to its turn late."""
    end = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
        world.deliver()
    assert condition()


def solving(seconds: float = 300.0) -> World:
    world = World(config={**CONFIG, "refine_s": seconds})
    for i in range(5):
        world.iteration(i)
    return world


def test_a_solver_that_is_killed_costs_its_plan_and_nothing_else(gpipe, monkeypatch):
    world = World(config={**CONFIG, "refine_s": 300.0})
    started = []
    popen = subprocess.Popen

    def and_killed(*args: Any, **more: Any) -> Any:
        process = popen(*args, **more)
        os.kill(process.pid, signal.SIGKILL)
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", and_killed)
    for i in range(5):
        world.iteration(i)
    until(world, lambda: parts(world))
    assert parts(world) == [("exact solver", "lost")] and started
    (event,) = world.events
    assert "killed by SIGKILL" in event.action and "without being improved" in event.action
    assert event.sentence().startswith("exact solver (rank 0 on n0) is lost since iteration")
    monkeypatch.undo()
    still_works(world)
    world.coordinator.close()


def test_a_solver_that_works_again_is_news_too(gpipe, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", refuse)
    world = solving()
    assert parts(world) == [("exact solver", "lost")]
    monkeypatch.setattr(subprocess, "Popen", POPEN)
    profile, found = world.coordinator._committed
    world.coordinator._refining.begin(profile, found)
    until(world, lambda: len(world.plans) == 2)
    assert parts(world) == [("exact solver", "lost"), ("exact solver", "healed")]
    assert world.plans[-1][-1].startswith("refined")
    world.coordinator.close()


POPEN = subprocess.Popen


def refuse(*args: Any, **more: Any) -> Any:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_solver_that_cannot_be_started_loses_no_event_and_no_report_of_a_plan(gpipe, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", refuse)
    world = solving()
    assert len(world.plans) == 1, "the plan is committed, and told of"
    assert parts(world) == [("exact solver", "lost")]
    assert "Resource temporarily unavailable" in world.events[0].action
    still_works(world)
    assert parts(world) == [("exact solver", "lost")], "told of once"


def test_or_tools_that_cannot_be_imported(gpipe, tmp_path, monkeypatch):
    (tmp_path / "ortools").mkdir()
    (tmp_path / "ortools-9.99.dist-info").mkdir()
    (tmp_path / "ortools" / "__init__.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    world = solving()
    until(world, lambda: parts(world))
    assert "GLIBC_2.99 not found" in world.events[0].action
    still_works(world)
    world.coordinator.close()


def test_what_a_solver_had_found_before_it_was_killed_is_used(gpipe):
    world = solving()
    refinement, _, running = world.coordinator._refining._running
    until(world, lambda: refinement.best.makespan_ms < running.makespan_ms * 0.99 or refinement.done)
    if not refinement.done:
        os.kill(refinement._process.pid, signal.SIGKILL)
    until(world, lambda: len(world.plans) == 2)
    world.coordinator.close()
    assert world.plans[-1][-1].startswith("refined")


VOTES = [
    {"version": 1},
    {"version": "one", "ok": True, "begun": 3},
    {"version": 1, "ok": "yes", "begun": 3},
    {"version": 1, "ok": True, "begun": None},
    {"version": 1, "ok": True, "begun": 1 << 40},
    {"version": [], "ok": True, "begun": -2},
]


@pytest.mark.parametrize("vote", VOTES)
def test_a_vote_that_makes_no_sense_is_a_no_and_hangs_nothing(vote, caplog):
    world = World()
    world.deaf = {3}
    i = 0
    while not world.sent:
        world.iteration(i)
        i += 1
    assert world.coordinator._leader.busy and world.plans == []
    world.deaf = set()
    world.queue.append((3, read({"type": "vote", **vote})))
    world.deliver()
    first = [m for rank, m in world.sent if rank == 2]
    assert first[1] == Abort(version=first[0].version), "at once, without a deadline"
    assert len(world.plans) == 1, "the next one got sensible votes"
    assert "counts as no" in caplog.text
    still_works(world)


def broken(*args: Any, **more: Any) -> Any:
    raise KeyError("nothing of the kind")


@pytest.mark.parametrize("callback", ["_on_event", "_on_plan", "_on_overview"])
def test_reports_that_fail_end_nothing(callback, monkeypatch, caplog):
    world = World()
    right = getattr(world.coordinator, callback)
    monkeypatch.setattr(world.coordinator, callback, broken)
    for i in range(8):
        world.iteration(i)
    for i in range(8, 14):
        versions = world.iteration(i, SLOW)
    assert versions[0] >= 2, "the slow link led to another plan"
    if callback != "_on_event":
        assert [state for _, state in parts(world)] == ["lost"] and findings(world) == [("link 1-2", "slow")]
    assert "nothing of the kind" in caplog.text
    monkeypatch.setattr(world.coordinator, callback, right)
    for i in range(14, 20):
        world.iteration(i)
    assert findings(world)[-1] == ("link 1-2", "healed")


def test_a_plan_that_cannot_be_made_for_one_profile(monkeypatch):
    world = World()
    for i in range(8):
        world.iteration(i)
    monkeypatch.setattr(deciding, "plan", broken)
    for i in range(8, 12):
        world.iteration(i, SLOW)
    (event,) = [event for event in world.events if event.kind == "link"]
    assert event.action.startswith("none: no plan (KeyError")
    assert parts(world) == [("planning", "lost")]
    monkeypatch.undo()
    for i in range(12, 20):
        world.iteration(i)
    still_works(world)


@pytest.mark.parametrize("step", ["simulate", "profile"])
def test_whatever_part_of_planning_fails(step, monkeypatch):
    world = World()
    for i in range(8):
        world.iteration(i)
    if step == "simulate":
        monkeypatch.setattr(deciding, "simulate", broken)
    else:
        monkeypatch.setattr(world.coordinator._measurements._estimator, "profile", broken)
    for i in range(8, 12):
        world.iteration(i, SLOW)
    assert findings(world) == [("link 1-2", "slow")]
    monkeypatch.undo()
    for i in range(12, 20):
        world.iteration(i)
    still_works(world)


def test_profiles_that_are_refused_are_no_failure_of_planning(monkeypatch):
    def refused(*args: Any) -> Any:
        raise PlanError("too many microbatches")

    world = World()
    for i in range(8):
        world.iteration(i)
    monkeypatch.setattr(world.coordinator._measurements._estimator, "profile", refused)
    for i in range(8, 12):
        world.iteration(i, SLOW)
    assert [event.action for event in world.events] == ["none: no plan (too many microbatches)"]


def test_an_iteration_that_detection_fails_on_is_passed_over(monkeypatch):
    world = World()
    for i in range(8):
        world.iteration(i)
    monkeypatch.setattr(world.coordinator._measurements._detector, "observe", broken)
    world.iteration(8)
    monkeypatch.undo()
    still_works(world, 9)
    assert parts(world) == [("detection", "lost"), ("detection", "healed")]


@pytest.mark.parametrize("part", ["detection", "replanning"])
def test_what_always_fails_is_given_up_as_an_event_and_a_vote_is_ended(part, monkeypatch):
    world = World()
    world.deaf = {3}
    i = 0
    while not world.sent:
        world.iteration(i)
        i += 1
    world.coordinator.start()
    if part == "detection":
        monkeypatch.setattr(world.coordinator._measurements._detector, "observe", broken)
    else:
        monkeypatch.setattr(world.coordinator._collector, "take", broken)
    world.deliver = lambda: [world.coordinator.post(*item) for item in world.queue]  # type: ignore[method-assign]
    for book in world.books:  # would wait for commit or abort
        monkeypatch.setattr(book, "begin", lambda *_: (0, None))
    for more in range(module.MOST_FAILURES + 5):
        world.queue.clear()
        world.iteration(i + more)
    end = time.monotonic() + 30
    while not world.coordinator._stopped and time.monotonic() < end:
        time.sleep(0.01)
    assert world.coordinator._stopped
    world.coordinator.close()
    ends = [m.type for rank, m in world.sent if rank == 2 and m.type in ("commit", "abort")]
    assert ends == ["abort"]
    assert parts(world) == [(part, "lost")] * 2
    assert f"failed {module.MOST_FAILURES} times in a row and is given up" in world.events[-1].action


def test_planning_that_always_fails_is_given_up_and_events_go_on(monkeypatch):
    monkeypatch.setattr(deciding, "plan", broken)
    monkeypatch.setattr(deciding, "REFRESH", 1)
    world = World()
    for i in range(30):
        world.iteration(i)
    for i in range(30, 34):
        world.iteration(i, SLOW)
    assert parts(world) == [("planning", "lost")]
    assert [event.action for event in world.events if event.kind == "link"] == [
        f"none: planning has failed {module.MOST_FAILURES} times in a row and is given up"
    ]


def test_a_rank_that_cannot_be_told_does_not_keep_the_commit_from_the_others(monkeypatch):
    world = World()
    send = world.coordinator._send

    def to_others(rank: int, message: Message) -> None:
        if rank == 1 and message.type == "commit":
            raise OSError("no buffer space")
        send(rank, message)

    monkeypatch.setattr(world.coordinator, "_send", to_others)
    for i in range(6):
        if world.plans:
            break
        world.iteration(i)
    assert {rank for rank, m in world.sent if m.type == "commit"} == {0, 2, 3}
    assert parts(world) == [("messages to rank 1", "lost")]


def report(i: int, change: dict[str, Any] | str | None) -> Message | Refused:
    """A sensible report of rank 1, but for `change`; a text or nothing: instead of it."""
    if not isinstance(change, dict):
        return read({"type": "report", "packed": change})
    times, link = StageTimes(10.0, 10.0, 6.0), LinkDelay(0, 1, 0.5, 8)
    sensible = IterationReport(0, 1, 1, "n1", i, 8, 300.0, 0, (times,), (link,))
    return read(Report.of(replace(sensible, **change)).to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3},
        {"pp_rank": 2, "links": ()},
        {"replica": 7},
        {"chunks": (StageTimes(1.0, 1.0, 1.0),) * 2},
        {"links": (LinkDelay(3, 1, 0.5, 8),)},
        {"links": (LinkDelay(0, 1, 0.5, 8),) * 2},
        {"iteration": 10**9},
        {"iteration_ms": float("nan")},
        {"microbatches": 0},
        "no base64",
        "AAAA",
        None,
    ],
    ids=str,
)
def test_an_impossible_report_costs_that_report(change):
    """The other ranks' reports of the same iteration count, and a link between two of them is found."""
    world = World()
    for i in range(8):
        world.iteration(i)
    right = world.coordinator.handle
    for i in range(8, 12):

        def instead(rank: int, message: Message | Refused, i: int = i) -> None:
            if rank == 1 and message.type == "report":
                message = report(i, change)
            right(rank, message)

        world.coordinator.handle = instead  # type: ignore[method-assign]
        world.iteration(i, {(0, 2, 3): 30.0})
    assert findings(world) == [("link 2-3", "slow")]
    assert parts(world) == [("measuring of rank 1", "lost")]
    assert len(world.plans) == 2
    world.coordinator.handle = right  # type: ignore[method-assign]
    for i in range(12, 20):
        world.iteration(i)
    still_works(world)
    assert parts(world)[1:] == [("measuring of rank 1", "healed")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PACKED = st.binary(max_size=120).map(lambda raw: base64.b64encode(b"\1" + raw).decode())
FIELDS = st.dictionaries(st.sampled_from(["version", "ok", "begun", "packed", "commit"]), JSON | PACKED)
MESSAGES = st.builds(lambda kind, fields: {**fields, "type": kind}, st.sampled_from(["vote", "report"]) | JSON, FIELDS)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.tuples(st.integers(-1, 5), MESSAGES | JSON), max_size=12), data=st.data())
def test_no_message_whatever_it_says_ends_detection(messages, data):
    world = World()
    for i in range(12):
        for rank, message in messages:
            if data.draw(st.booleans()):
                world.queue.append((rank, read(message)))
        world.iteration(i)
    for i in range(12, 20):
        world.iteration(i)
    still_works(world)


def test_a_part_that_fails_now_and_then_is_told_of_once():
    told: list[tuple[str, str]] = []
    some = Parts(lambda part, state, text: told.append((part, state)))
    for i in range(100):
        with some.guard("a part", "it is left out"):
            if i % 3 == 0:
                raise ValueError(i)
    assert told == [("a part", "lost")] and some.failures("a part") == 1
    for _ in range(10):
        some.works("a part")
    assert told == [("a part", "lost"), ("a part", "healed")] and some.failures("a part") == 0


def test_news_that_cannot_be_told_are_logged(caplog):
    Parts(broken).lost("a part", "it is left out", "it is broken")
    assert "a part is lost (it is left out: it is broken), which cannot be reported" in caplog.text


def test_no_thread_ends(monkeypatch):
    """A message that fails in a way nobody has thought of, on the coordinator's own thread."""
    world = World()
    world.coordinator.start()
    right = world.coordinator.handle
    calls = []

    def once(rank: int, message: Message | Refused) -> None:
        if not calls:
            calls.append(threading.current_thread().name)
            raise RuntimeError("unthinkable")
        right(rank, message)

    monkeypatch.setattr(world.coordinator, "handle", once)
    world.deliver = lambda: [world.coordinator.post(*item) for item in world.queue]  # type: ignore[method-assign]
    for i in range(3):
        world.queue.clear()
        world.iteration(i)
    world.coordinator.close(last=2, patience_s=20)
    assert calls == ["adaptra-coordinator"]
    assert [overview["iteration"] for overview in world.overviews] == [1, 2], "the message cost its iteration"
    assert parts(world) == [("replanning", "lost")]
