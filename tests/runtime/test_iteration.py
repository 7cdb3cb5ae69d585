"""What an iteration makes of the messages it receives."""

from __future__ import annotations

import torch

from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.runtime.iteration import Iteration, Links
from adaptra_plugin.runtime.stopwatch import stopwatch_for
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.transport import Direction, Message


class Arrived:
    def __init__(self, message):
        self.message = message

    def wait(self):
        return self.message


class Posting:
    def __init__(self, messages):
        self.messages = messages

    def recv(self, key, device):
        assert (key.direction, key.stage) == (Direction.ACTIVATION, 1)
        return Arrived(self.messages[key.microbatch])


def iteration(messages):
    forwards = [Action(1, Kind.FORWARD, n) for n in range(len(messages))]
    made = Iteration(
        index=0,
        step_id=1,
        version=0,
        actions=tuple(forwards),
        microbatches=len(messages),
        topology=Topology(1, ((0, 1),)),
        links=Links(Posting(messages), None),
        stopwatch=stopwatch_for(torch.device("cpu")),
        throttle=ComputeThrottle(None),
    )
    for forward in forwards:
        made.receive(forward)
    return made


def test_the_delay_of_a_link_is_the_median_over_its_messages():
    delays = iteration([Message((), 0, 2.0), Message((), 0, 900.0), Message((), 0, 4.0)]).link_delays()
    assert [(d.src, d.dst, d.delay_ms, d.messages) for d in delays] == [(0, 1, 4.0, 3)]
    assert iteration([]).link_delays() == ()
