"""What an iteration makes of the messages it receives."""

from __future__ import annotations

import time

import pytest
import torch

from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.runtime.iteration import Iteration, Links
from adaptra_plugin.runtime.stopwatch import stopwatch_for
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.transport import Direction, Message


class Arrived:
    def __init__(self, message, wait):
        self.message = message
        self.until_there = wait

    def wait(self):
        self.until_there()
        return self.message


class Posting:
    def __init__(self, messages, wait=lambda: None):
        self.messages = messages
        self.wait = wait
        self.blocked_ms = 0.0
        self.flushed = 0

    def flush(self):
        self.flushed += 1

    def recv(self, key, device):
        assert (key.direction, key.stage) == (Direction.ACTIVATION, 1)
        return Arrived(self.messages[key.microbatch], self.wait)


def iteration(messages, links=None):
    forwards = [Action(1, Kind.FORWARD, n) for n in range(len(messages))]
    made = Iteration(
        index=0,
        step_id=1,
        version=0,
        actions=tuple(forwards),
        microbatches=len(messages),
        topology=Topology(1, ((0, 1),)),
        links=links or Links(Posting(messages), None),
        stopwatch=stopwatch_for(torch.device("cpu")),
        throttle=ComputeThrottle(None),
    )
    return made


def received(messages):
    made = iteration(messages)
    for forward in made.actions:
        made.receive(forward)
    return made


def test_the_delay_of_a_link_is_the_median_over_its_messages():
    delays = received([Message((), 0, 2.0), Message((), 0, 900.0), Message((), 0, 4.0)]).link_delays()
    assert [(d.src, d.dst, d.delay_ms, d.messages) for d in delays] == [(0, 1, 4.0, 3)]
    assert received([]).link_delays() == ()


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("beside_host", [False, True])
def test_a_plan_leaves_time_for_what_the_thread_does_around_a_computation_but_not_for_waiting(
    monkeypatch, beside_host, wraps
):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def take(ms):
        now[0] += ms / 1e3

    before = Posting([Message((), 0, 0.0)] * 3, wait=lambda: take(100))
    made = iteration(before.messages, Links(before, before if wraps else None))
    made.stopwatch.beside_host = beside_host
    for forward in made.actions:
        take(1)
        made.receive(forward)
        take(2)
        with made.compute(forward):
            take(10)
        take(40)  # a send, of which 37 ms were waiting for room
        before.blocked_ms += 37
    made.finish()
    (times,) = made.stage_times()
    assert times.forward_ms == pytest.approx(10 if beside_host else 10 + 1 + 2 + 3)
    assert made.report("h").compute_ms == pytest.approx(30)
    assert before.flushed == 1
