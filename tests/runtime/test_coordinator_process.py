"""The coordinator in a process of its own: as in a thread, and what becomes of the job when the process is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adaptra_plugin import isolated
from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.coordinator_frames import Frame, FrameReader, frame, json_frame, message_frames, reports_of
from adaptra_plugin.runtime.coordinator_process import CoordinatorProcess
from adaptra_plugin.runtime.messages import Abort, Report
from adaptra_plugin.runtime.routing import Router
from adaptra_plugin.runtime.starting import THREAD_RANKS, has_own_process
from adaptra_plugin.runtime.topology import Topology
from tests.runtime.test_coordinator import World

SLOW = {(0, 1, 2): 30.0}


def until(condition: Callable[[], Any], deadline_s: float = 60.0) -> None:
    """The process has to start, and may be starved."""
    end = time.monotonic() + deadline_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


class Away(World):
    """`deliver` waits until the process has answered everything."""

    answers = True
    expected = -1

    def made(self, config: AdaptraConfig, **more: Any) -> Any:
        process = CoordinatorProcess(self.topology, config, microbatches=8, **more)
        process.start()
        return process

    def iteration(self, index: int, *args: Any, **more: Any) -> list[int]:
        self.expected = index
        return super().iteration(index, *args, **more)

    def deliver(self) -> None:
        def relayed() -> bool:
            while self.queue:
                rank, message = self.queue.pop(0)
                self.coordinator.relay(rank, message.to_json())  # type: ignore[union-attr]
            return self.coordinator.complete >= self.expected and not (self.answers and self.coordinator._undecided)

        if not self.coordinator._over:
            until(relayed)


@pytest.fixture
def world() -> Iterator[Away]:
    world = Away()
    yield world
    world.coordinator.close()
    assert world.coordinator._process.poll() is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adaptra-coordinator")]


def test_a_slow_link_leads_to_a_plan_that_all_ranks_begin_together_and_back(world):
    ran = [world.iteration(i) for i in range(8)]
    ran += [world.iteration(i, SLOW) for i in range(8, 14)]
    until(lambda: world.events)
    (event,) = world.events
    assert (event.kind, event.state, event.link, event.hosts) == ("link", "slow", "1-2", ("n1", "n2"))
    assert event.predicted_gain > 1.1 and f"replan v{event.plan_version} from iteration" in event.action
    ran += [world.iteration(i) for i in range(14, 22)]
    assert all(len(set(versions)) == 1 for versions in ran) and ran[-1][0] > ran[13][0] > ran[7][0]
    until(lambda: len(world.events) == 2 and len(world.plans) == ran[-1][0] and len(world.overviews) == 22)
    assert [overview["iteration"] for overview in world.overviews] == list(range(22))
    plans = {version: plan for version, _, plan, _, _ in world.plans}
    assert sum(plans[ran[13][0]].warmup) > sum(plans[ran[-1][0]].warmup), "the warm-ups go back"
    assert [reason for *_, reason in world.plans][1:] == ["link 1-2 slow", "link 1-2 healed"]


def test_the_same_plans_and_events_as_in_a_thread(world):
    here = World()
    for each in (here, world):
        for i in range(14):
            each.iteration(i, SLOW if i >= 8 else None)
    until(lambda: len(world.plans) == len(here.plans) and len(world.events) == len(here.events))
    assert [plan[:3] for plan in world.plans] == [plan[:3] for plan in here.plans]
    assert [event.sentence() for event in world.events] == [event.sentence() for event in here.events]
    assert world.overviews == here.overviews


def test_a_process_that_is_lost_leaves_nobody_waiting_and_training_goes_on(world):
    world.deaf = {3}
    world.answers = False
    i = 0
    while not world.coordinator._undecided:
        world.iteration(i)
        i += 1
    world.coordinator._process.send_signal(signal.SIGKILL)
    until(lambda: world.events)
    (prepared, end) = [message for rank, message in world.sent if rank == 2]
    assert end == Abort(version=prepared.version)
    (event,) = world.events
    assert (event.part, event.state) == ("coordinator", "lost")
    assert "training goes on with the running plan" in event.action and "exit code -9" in event.action
    for more in range(i, i + 5):
        assert world.iteration(more) == [0, 0, 0, 0]
    assert not world.coordinator._waiting, "nothing is kept for it"


def test_messages_that_make_no_sense_cost_nothing_else(world):
    for data in (
        {"type": "report"},
        {"type": "report", "packed": 3},
        {"type": "report", "packed": "AAAA"},
        {"type": "report", "packed": "\ud800\n", "more": {}},
        {"type": "report", "packed": "\ud800"},
        {"type": "vote", "version": []},
        {"type": "vote", "version": 10**30, "ok": True, "begun": 1},
    ):
        for rank in (-1, 1, 99):
            world.coordinator.relay(rank, data)
    for i in range(14):
        world.iteration(i, SLOW if i >= 8 else None)
    until(lambda: any(event.kind == "link" for event in world.events))
    assert {event.part for event in world.events if event.kind == "part"} <= {"measuring of rank 1"}


def test_another_schedule_than_configured(world):
    world.coordinator.keep("1f1b")
    for i in range(14):
        world.iteration(i, SLOW if i >= 8 else None)
    until(lambda: world.events)
    assert [event.action for event in world.events] == ["none: schedule 1f1b does not adapt"] and world.plans == []


def test_the_end_waits_for_the_last_reports_and_not_for_what_will_not_come(world):
    for i in range(3):
        world.iteration(i)
    world.coordinator.close(last=2, patience_s=60.0)
    assert len(world.overviews) == 3
    begun = time.monotonic()
    world.coordinator.close(last=7, patience_s=0.1)
    assert time.monotonic() - begun < 30


def test_a_process_that_cannot_be_started(monkeypatch):
    def refuse(*args: Any, **more: Any) -> Any:
        raise OSError(errno.ENOENT, "no such interpreter")

    monkeypatch.setattr(isolated, "start", refuse)
    with pytest.raises(
        TransportError, match=r'the coordinator\'s process cannot be started .*adaptra.coordinator to "thread"'
    ):
        Away()


def test_it_ends_with_the_process_that_has_started_it():
    ours, theirs = socket.socketpair()
    stranger = str(os.getpid() + 1)
    process = isolated.start(
        *("adaptra_plugin.runtime.coordinator_worker", str(theirs.fileno()), stranger),
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
    )
    with ours, theirs:
        assert process.wait(60) == 0


def test_it_needs_no_torch():
    code = "import sys, adaptra_plugin.runtime.coordinator_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0


def test_frames_come_whole_however_they_are_cut():
    ours, theirs = socket.socketpair()
    said = [(Frame.BEGUN, -1, b""), (Frame.COMPLETE, 7, b"x" * 100), (Frame.KEEP, 0, b"1f1b")]
    wire = b"".join(frame(*each) for each in said) + json_frame(Frame.PLAN, {"a": 1}, 1 << 40)
    found = []
    with ours, theirs:
        reader = FrameReader(theirs)
        for at in range(0, len(wire), 5):
            ours.sendall(wire[at : at + 5])
            found += reader.receive()
        assert found == [*said, (Frame.PLAN, 1 << 40, b'{"a":1}')]
        ours.sendall(b"\xff" + wire[1:])
        with pytest.raises(ValueError, match="255"):
            list(reader.receive())
        ours.close()
        with pytest.raises(EOFError):
            for _ in range(100):
                reader._buffer.clear()
                list(reader.receive())


def test_reports_go_together_and_what_breaks_a_line_goes_apart():
    def report(packed: Any) -> dict[str, Any]:
        return {"type": "report", "packed": packed}

    def taken(messages: list[tuple[int, dict[str, Any]]]) -> list[Any]:
        found: list[Any] = []
        for raw in message_frames(messages):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.sendall(raw)
                ((kind, _, payload),) = FrameReader(theirs).receive()
            if kind is Frame.REPORTS:
                found += [(rank, report(packed)) for rank, packed in reports_of(payload)]
            else:
                assert kind is Frame.MESSAGES
                found += [(rank, data) for rank, data in json.loads(payload)]
        return found

    vote = {"type": "vote", "version": 1}
    for messages in (
        [],
        [(1, report("a"))],
        [(1, report("")), (2, report(""))],
        [(1, report("a")), (7, report("b")), (2, vote), (3, report(4))],
        [(1, report("a\nb")), (2, report("c"))],
        [(1, report("\n"))],
        [(2, vote), (2, {"type": "report"})],
    ):
        assert sorted(map(str, taken(messages))) == sorted(map(str, messages))
    assert taken([(1, report("é\ud800"))]) == [(1, report("??"))], "which is refused where it is read"


def test_relayed_messages_are_not_read_and_others_are():
    relayed: list[Any] = []
    router = Router(0, transmit=lambda rank, data: None, silent=lambda: False)
    router.relay(lambda rank, data: relayed.append((rank, data)), Report)
    router.receive(3, {"type": "report", "packed": []})
    router.receive(3, {"type": ["report"]})
    router.receive(3, ["report"])
    router.send(0, Report(packed="x"))
    assert relayed == [(3, {"type": "report", "packed": []}), (0, {"type": "report", "packed": "x"})]


def test_which_jobs_have_one():
    def own(ranks: int, **config: Any) -> bool:
        return has_own_process(parse_config(config or True), Topology.of(0, [list(range(ranks))]))

    assert not own(THREAD_RANKS) and own(THREAD_RANKS + 1)
    assert own(2, coordinator="process") and not own(1000, coordinator="thread")
