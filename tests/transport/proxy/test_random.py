"""Whatever happens to rails: nothing is lost, nothing comes twice, nothing is corrupted, and memory stays bounded.

`ADAPTRA_EXAMPLES=2000 pytest tests/transport/proxy/test_random.py` looks longer; a failure prints how to repeat it, and
`--hypothesis-seed` makes a whole run repeatable.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from adaptra_plugin.config import parse_config
from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.proxy.rails.faulty import FaultyRail
from adaptra_plugin.transport.proxy.wire import UNIT
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.ends import End, Pair
from tests.transport.proxy.memory import Cable
from tests.transport.proxy.strategies import faults, moments

KIB = 1 << 10
EXAMPLES = int(os.environ.get("ADAPTRA_EXAMPLES", "200"))
SCHEDULE_S = 6.0
"""When everything that happens to the rails themselves is over."""

times = moments(SCHEDULE_S)


@st.composite
def cables(draw) -> list[Cable]:
    kinds = draw(
        st.lists(st.sampled_from([RailKind.TCP, RailKind.TCP, RailKind.TCP, RailKind.RDMA]), min_size=1, max_size=3)
    )
    if draw(st.booleans()):
        kinds.append(RailKind.SHM)
    found = []
    for kind in RailKind:
        for index in range(kinds.count(kind)):
            found.append(
                Cable(
                    kind.word if kind is RailKind.SHM else f"{kind.word}{index}",
                    kind,
                    latency_s=draw(st.sampled_from([1e-4, 1e-3, 0.03])),
                    bytes_per_s=draw(st.sampled_from([2e7, 1e8, 1e9])),
                    piece_bytes=draw(st.sampled_from([KIB, 8 * KIB])),
                )
            )
    return found


@dataclass(frozen=True)
class Step:
    """Something that happens."""

    when: float
    what: str
    which: int
    seed: int


steps = st.lists(
    st.builds(
        Step,
        times,
        st.sampled_from(["send", "send", "send", "send", "talk", "snap", "cut", "heal", "down", "up", "unmap"]),
        st.integers(0, 7),
        st.integers(0, 1 << 20),
    ),
    min_size=5,
    max_size=40,
)


class Run:
    """One pair of links and all that happens to it."""

    def __init__(self, pair: Pair, lanes: int, largest: int) -> None:
        self.pair = pair
        self.lanes = lanes
        self.largest = largest
        self.talked = {"a": 0, "b": 0}

    def do(self, step: Step) -> None:
        end = (self.pair.a, self.pair.b)[step.which % 2]
        cable = list(self.pair.cables.values())[step.which % len(self.pair.cables)]
        if step.what == "send":
            self._send(end, random.Random(step.seed))
        elif step.what == "talk":
            for _ in range(step.seed % 5 + 1):
                end.link.send_control(b'{"n": %d}' % self.talked[end.name])
                self.talked[end.name] += 1
            end.link.stuck(Direction.GRADIENT, 0, bool(step.seed % 2))
            end.link.pump()
        elif step.what == "snap":
            cable.snap()
        elif step.what == "cut":
            cable.cut = True
        elif step.what == "heal":
            cable.heal()
        elif step.what in ("down", "up"):
            cable.down = step.what == "down"
        elif "shm" in end.link.connections:
            end.link.connections["shm"].ready = not end.link.connections["shm"].ready

    def _send(self, end: End, rng: random.Random) -> None:
        for _ in range(rng.randrange(1, 30)):
            nbytes = min(self.largest, rng.choice([1, 64, 500, 5 * KIB, 20 * KIB, 70 * KIB, 200 * KIB]))
            lane = (Direction(rng.randrange(2)), rng.randrange(self.lanes))
            end.send(rng.randrange(nbytes) + 1, key=(lane, rng.randrange(3)), lane=lane)

    def check_memory(self) -> None:
        """Now and then: what is kept follows from what the rings hold, not from how long this has been going on."""
        for end in (self.pair.a, self.pair.b):
            link = end.link
            most = sum(allocator.capacity for allocator in end.allocators.values()) // UNIT
            for connection in link.connections.values():
                assert len(connection.under_way) < 5000
            for inbox in link._arrivals.inboxes.values():
                assert len(inbox.gone) <= most and len(inbox.messages) <= most
                assert len(inbox._gone_first) == len(inbox.gone)
            assert len(link._outbox.small) + len(link._outbox.large) <= 2 * most
        self.pair.world.call_later(0.25, self.check_memory)

    def idle(self) -> bool:
        """Whether nothing waits for an acknowledgement any more."""
        links = [end.link for end in (self.pair.a, self.pair.b)]
        return all(
            not link.untaken.waiting
            and not link.unsent
            and not any(connection.under_way for connection in link.connections.values())
            for link in links
        )

    def check_nothing_is_left(self) -> None:
        for end in (self.pair.a, self.pair.b):
            link = end.link
            for connection in link.connections.values():
                assert not connection.placed and not connection.inflight
            for inbox in link._arrivals.inboxes.values():
                assert not inbox.messages and not inbox._followers
            assert not any(link._outbox.lanes.values()) and not link._urgent and not link._free
            assert link._outbox.peek() is None and link._outbox.waiting_bytes == 0
            assert not link._control_in._held and link.untaken.waiting == 0
            for rail in (connection.rail for connection in link.connections.values()):
                assert not isinstance(rail, FaultyRail) or len(rail._held) < 100


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
)
@given(
    cables=cables(),
    faults=st.lists(faults(SCHEDULE_S), max_size=6),
    steps=steps,
    capacity=st.sampled_from([16 * KIB, 128 * KIB, 512 * KIB]),
    segment=st.sampled_from([3 * KIB, 64 * KIB]),
    lanes=st.integers(1, 2),
    hold_s=st.sampled_from([0.0, 0.001, 0.2]),
)
def test_everything_arrives_once_in_order_and_whole(cables, faults, steps, capacity, segment, lanes, hold_s):
    simulate = parse_config({"simulate": {"faults": faults}}).simulate.model_dump(mode="json")
    pair = Pair(*cables, capacity=capacity, segment=segment, lanes=lanes, simulate=simulate)
    try:
        run = Run(pair, lanes, capacity)
        rng = random.Random(1)
        for end in (pair.a, pair.b):
            end.hold_s = lambda: rng.random() * hold_s
        for step in steps:
            pair.world.call_later(step.when, lambda step=step: run.do(step))
        run.check_memory()
        pair.world.run(SCHEDULE_S)
        for cable in cables:
            cable.down = False
            cable.heal()
        for end in (pair.a, pair.b):
            if "shm" in end.link.connections:
                end.link.make_ready("shm")
        note(f"faults: {faults}")
        pair.settle(900.0)
        assert pair.world.run(120.0, run.idle), pair.explain()
        for end in (pair.a, pair.b):
            pair.check(end, next(end.numbers))
            assert [message["n"] for message in end.peer.controls] == list(range(run.talked[end.name]))
        run.check_nothing_is_left()
        for end in (pair.a, pair.b):
            end.link.say_goodbye()
        assert pair.world.run(120.0, lambda: pair.a.done and pair.b.done)
    finally:
        pair.close()
