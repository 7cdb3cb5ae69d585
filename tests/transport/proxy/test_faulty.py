"""Injected faults: what each of them does to the frames of a rail, and that the link lives with it."""

from __future__ import annotations

import itertools

import pytest

from adaptra_plugin.config import parse_config
from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail, RailKind
from adaptra_plugin.transport.proxy.rails.faulty import STALL_STEP_S, Faults, FaultyRail, RailFault
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, Flag, FrameHeader, FrameKind, MalformedFrame, parse
from tests.transport.proxy.ends import content
from tests.transport.proxy.memory import Cable, World

KIB, MIB = 1 << 10, 1 << 20


class Recorder(Rail):
    """A rail that writes down what it is given, and its own sink."""

    limit, lanes = MIB, 2

    def __init__(self, world: World, kind: RailKind = RailKind.TCP, name: str = "tcp0") -> None:
        super().__init__(kind, name, self)
        self.world = world
        self.frames: list[tuple[float, Frame]] = []
        self.heard: list[tuple] = []

    def submit(self, frame: Frame) -> None:
        self.frames.append((round(self.world.now - 100.0, 6), frame))

    @property
    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def place(self, rail, header):
        self.heard.append(("place", rail, header))

    def arrived(self, rail, header, body=b""):
        self.heard.append(("arrived", rail, header, body))

    def failed(self, rail, reason):
        self.heard.append(("failed", rail, reason))


def simulate(*faults, links=()):
    """As the endpoint passes it on."""
    block = {"faults": [{"src": 0, "dst": 1, **fault} for fault in faults], "links": list(links)}
    return parse_config({"simulate": block}).simulate.model_dump(mode="json")


def wrapped(*faults, links=(), kind=RailKind.TCP, name="tcp0"):
    world = World()
    found = Faults(simulate(*faults, links=links), 0, world)
    inner = Recorder(world, kind, name)
    return world, found, inner, found.wrap(inner, 1)


def segment(number, nbytes=1000, sent=100.0):
    header = FrameHeader(FrameKind.SEGMENT, number, Flag.VERIFIED, message=0, total=nbytes, length=nbytes, sent=sent)
    return Frame(header, [memoryview(content(number, nbytes))])


def sequences(inner):
    return [frame.header.sequence for _, frame in inner.frames]


def send(rail, count=200, **options):
    for number in range(1, count + 1):
        rail.submit(segment(number, **options))


def test_without_a_fault_for_it_a_rail_stays_as_it_is():
    world = World()
    inner = Recorder(world)
    assert Faults({}, 0, world).wrap(inner, 1) is inner
    faults = Faults(simulate({"kind": "stall", "rail": "tcp1"}), 0, world)
    assert faults.wrap(inner, 1) is inner  # another rail
    assert isinstance(faults.wrap(Recorder(world, name="tcp1"), 1), FaultyRail)
    assert faults.wrap(Recorder(world, name="tcp1"), 2).name == "tcp1"
    assert not isinstance(faults.wrap(Recorder(world, name="tcp1"), 2), FaultyRail)  # another link
    assert isinstance(Faults(simulate({"kind": "stall"}), 1, world).wrap(inner, 0), FaultyRail)


@pytest.mark.parametrize(
    ("rail", "kind", "name", "hit"),
    [
        ("any", RailKind.SHM, "shm", True),
        ("tcp", RailKind.TCP, "tcp3", True),
        ("tcp", RailKind.SHM, "shm", False),
        ("tcp3", RailKind.TCP, "tcp3", True),
        ("tcp3", RailKind.TCP, "tcp30", False),
        ("rdma", RailKind.RDMA, "rdma1", True),
        ("shm", RailKind.SHM, "shm", True),
    ],
)
def test_a_fault_is_for_a_rail_a_kind_of_rails_or_all(rail, kind, name, hit):
    _, _, inner, found = wrapped({"kind": "stall", "rail": rail}, kind=kind, name=name)
    assert (found is not inner) == hit


def test_it_is_a_rail_and_a_sink():
    world, _, inner, rail = wrapped({"kind": "latency", "ms": 3})
    assert (rail.kind, rail.name, rail.sink, inner.sink) == (inner.kind, inner.name, inner, rail)
    assert (rail.limit, rail.lanes, rail.describe()) == (MIB, 2, "tcp0")
    header = FrameHeader(FrameKind.PING)
    rail.place(inner, header)
    rail.arrived(inner, header, b"x")
    rail.failed(inner, "broken")
    assert inner.heard == [
        ("place", rail, header), ("arrived", rail, header, b"x"), ("failed", rail, "broken")
    ]  # fmt: skip
    assert rail.closed and inner.closed
    send(rail)
    world.run(10.0)
    assert inner.frames == []


def test_latency_holds_everything_and_keeps_the_order():
    world, _, inner, rail = wrapped({"kind": "latency", "ms": 30})
    rail.submit(Frame(FrameHeader(FrameKind.PING)))
    send(rail, 3)
    assert rail.backlog == 4 * HEADER_BYTES + 3000
    world.run(1.0)
    assert [when for when, _ in inner.frames] == [0.03] * 4 and sequences(inner) == [0, 1, 2, 3]
    assert rail.backlog == 0


def test_jitter_keeps_the_order():
    world, _, inner, rail = wrapped({"kind": "jitter", "ms": 30})
    for number in range(1, 101):
        rail.submit(segment(number))
        world.run(0.01)
    world.run(1.0)
    assert sequences(inner) == list(range(1, 101))
    late = [round(when - 0.01 * index, 6) for index, (when, _) in enumerate(inner.frames)]
    assert 0.0 <= min(late) < 0.01 and 0.025 < max(late) <= 0.03


def test_bandwidth_spaces_frames_out():
    world, _, inner, rail = wrapped({"kind": "bandwidth", "mb_per_s": 1})
    send(rail, 10, nbytes=10_000 - HEADER_BYTES)
    world.run(1.0)
    assert [when for when, _ in inner.frames] == [round(0.01 * n, 6) for n in range(1, 11)]


def test_a_stalled_rail_holds_everything_and_then_goes_on_in_order():
    world, _, inner, rail = wrapped({"kind": "stall", "from_s": 1, "to_s": 2}, {"kind": "jitter", "ms": 3})
    rail.submit(segment(1))
    world.run(1.0)
    for number in range(2, 50):
        rail.submit(segment(number))
        rail.submit(Frame(FrameHeader(FrameKind.PING)))
    world.run(0.9)
    assert sequences(inner) == [1] and rail.backlog > 48 * 1000
    world.run(0.2)
    rail.submit(segment(50))
    world.run(0.1)
    assert [number for number in sequences(inner) if number] == list(range(1, 51)) and rail.backlog == 0
    assert all(when < 1.0 or when >= 2.0 for when, _ in inner.frames)


def test_corruption_changes_a_copy_of_the_body_and_never_the_ring():
    _, _, inner, rail = wrapped({"kind": "corruption", "rate": 0.5})
    ring = bytearray(content(1, 1000))
    view = memoryview(ring)
    for number in range(1, 101):
        frame = Frame(segment(number).header, [view[:300], view[300:]])
        rail.submit(frame)
    assert bytes(ring) == content(1, 1000)
    bodies = [b"".join(frame.body) for _, frame in inner.frames]
    wrong = [body for body in bodies if body != ring]
    assert 30 < len(wrong) < 70
    assert all(sum(a != b for a, b in zip(body, ring, strict=True)) == 1 for body in wrong)
    rail.submit(Frame(FrameHeader(FrameKind.PING)))
    assert inner.frames[-1][1].header.pack() == FrameHeader(FrameKind.PING).pack()


def test_a_rail_that_damages_bodies_says_so_whatever_checksums_are_configured():
    assert wrapped({"kind": "corruption", "rate": 0.5})[3].damages
    assert not wrapped({"kind": "stall"})[3].damages and not Recorder(World()).damages


def test_a_damaged_header_is_noticed_wherever_it_is_hit():
    _, _, inner, rail = wrapped({"kind": "corruption", "rate": 1.0, "part": "header"})
    send(rail, 500)
    hit = set()
    for _, frame in inner.frames:
        raw, right = frame.header.pack(), segment(frame.header.sequence).header.pack()
        hit |= {at for at in range(HEADER_BYTES) if raw[at] != right[at]}
        with pytest.raises(MalformedFrame):
            parse(raw, limit=MIB, lanes=2)
    assert len(hit) > HEADER_BYTES // 2


def test_death_ends_the_connection_after_the_call_and_every_new_one_as_long_as_it_lasts():
    world = World()
    faults = Faults(simulate({"kind": "death", "from_s": 1, "to_s": 2}), 0, world)
    first = Recorder(world)
    rail = faults.wrap(first, 1)
    rail.submit(segment(1))
    world.run(1.5)
    assert first.frames and not rail.closed
    rail.submit(segment(2))
    assert not rail.closed and first.heard == []  # never from within `submit`
    world.run(0.0)
    assert (
        rail.closed and first.closed and first.heard == [("failed", rail, "a fault of adaptra.simulate has ended it")]
    )
    second = Recorder(world)
    again = faults.wrap(second, 1)
    world.run(0.0)
    assert again.closed and len(second.heard) == 1
    world.run(1.0)
    third = Recorder(world)
    rail = faults.wrap(third, 1)
    world.run(1.0)
    rail.submit(segment(3))
    assert third.frames and not rail.closed


def test_death_by_chance():
    world, _, inner, rail = wrapped({"kind": "death", "rate": 0.01})
    for number in range(1, 2000):
        rail.submit(segment(number))
        world.run(0.0)
    assert rail.closed and 5 < len(inner.frames) < 1000


def test_a_fault_is_active_by_iteration_or_by_time():
    fault = RailFault("stall", 0, 1, from_iteration=3, to_iteration=5)
    assert [n for n in range(8) if fault.active(n, 0.0)] == [3, 4]
    fault = RailFault("stall", 0, 1, from_s=1.0, to_s=2.0)
    assert [t for t in (0.0, 0.99, 1.0, 1.99, 2.0) if fault.active(7, t)] == [1.0, 1.99]
    world, faults, inner, rail = wrapped({"kind": "stall", "from_iteration": 1, "to_iteration": 2})
    for faults.iteration in range(3):
        rail.submit(segment(faults.iteration + 1))
        world.run(1.0)
    assert sequences(inner) == [1, 2, 3] and inner.frames[0][0] == 0.0
    assert all(2.0 <= when <= 2.0 + STALL_STEP_S for when, _ in inner.frames[1:])


def test_the_same_seed_is_the_same_fate_and_every_connection_has_its_own():
    def fate(seed, connections=1):
        world = World()
        faults = Faults(simulate({"kind": "corruption", "rate": 0.5, "seed": seed}), 0, world)
        for _ in range(connections):
            inner = Recorder(world)
            send(faults.wrap(inner, 1))
        return [b"".join(frame.body) for _, frame in inner.frames]

    assert fate(1) == fate(1) != fate(2)
    assert fate(1, connections=2) == fate(1, connections=2) != fate(1)


# --- slow links, as they always were


def slow(latency_ms, **options):
    return {"src": 1, "dst": 0, "latency_ms": latency_ms, **options}


def test_a_slow_link_delays_transfers_but_not_what_measures_them():
    world, _, inner, rail = wrapped(links=[slow(36)])
    rail.submit(Frame(FrameHeader(FrameKind.STUCK, 1)))
    for number in (2, 3):
        rail.submit(segment(number))
    rail.submit(Frame(FrameHeader(FrameKind.STUCK, 4)))
    for kind in (FrameKind.ACK, FrameKind.PING, FrameKind.PONG):
        rail.submit(Frame(FrameHeader(kind)))
    world.run(1.0)
    assert [(frame.header.kind, when) for when, frame in inner.frames] == [
        (FrameKind.STUCK, 0.0),
        (FrameKind.ACK, 0.0),
        (FrameKind.PING, 0.0),
        (FrameKind.PONG, 0.0),
        (FrameKind.SEGMENT, 0.036),
        (FrameKind.SEGMENT, 0.036),
        (FrameKind.STUCK, 0.036),
    ]


def test_on_a_slow_link_what_a_transfer_acknowledges_is_told_at_once():
    world, _, inner, rail = wrapped(links=[slow(36)])
    for number, ack in enumerate((0, 5, 5, 6), start=1):
        frame = segment(number)
        frame.header.ack = ack
        rail.submit(frame)
    assert [(frame.header.kind, frame.header.ack) for _, frame in inner.frames] == [
        (FrameKind.ACK, 5),
        (FrameKind.ACK, 6),
    ]
    world.run(1.0)
    assert sequences(inner) == [0, 0, 1, 2, 3, 4]


def test_on_a_slow_link_transfers_overlap():
    # the delay counts from when the message was ready: one that has waited for its turn is not delayed twice
    world, _, inner, rail = wrapped(links=[slow(36), slow(4)])
    world.run(0.03)
    rail.submit(segment(1, sent=100.0))
    world.run(0.1)
    rail.submit(segment(2, sent=100.0))
    assert [when for when, _ in inner.frames] == [0.04, 0.13]


def test_a_slow_link_follows_the_iteration():
    world, faults, inner, rail = wrapped(links=[slow(36, from_iteration=1, to_iteration=2)])
    rail.submit(segment(1))
    faults.iteration = 1
    rail.submit(segment(2, sent=100.0))
    faults.iteration = 2
    rail.submit(segment(3, sent=100.0))  # stays behind the one that is held
    world.run(0.1)
    rail.submit(segment(4))
    assert [when for when, _ in inner.frames] == [0.0, 0.036, 0.036, 0.1]


def test_a_slow_link_adds_its_latency_to_every_transfer_and_nothing_else(pairs):
    def delays(pair):
        found = []
        for nbytes in (KIB, 8 * MIB, KIB):
            start = pair.world.now
            pair.a.send(nbytes)
            assert pair.world.run(5.0, lambda: len(pair.b.delivered) > len(found))
            found.append(pair.world.now - start)
            pair.settle()
        return found

    options = {"capacity": 16 * MIB, "segment": MIB}
    plain = delays(pairs(Cable("tcp0"), Cable("tcp1"), **options))
    late = pairs(Cable("tcp0"), Cable("tcp1"), **options, simulate=simulate(links=[slow(36)]))
    for before, after in zip(plain, delays(late), strict=True):
        assert after - before == pytest.approx(0.036, abs=0.004)
    assert late.a.link.retries == 0 and late.a.lost == []
    assert {health.state for health in late.a.link.health.values()} == {State.HEALTHY}


def test_a_slow_link_slower_than_patience_only_delays(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), capacity=16 * MIB, simulate=simulate(links=[slow(500)]))
    for _ in range(20):
        pair.a.send(MIB)
        pair.settle()
    pair.check(pair.a, 20)
    assert pair.a.lost == pair.b.lost == []


# --- the link lives with each of them


@pytest.mark.parametrize(
    "faults",
    [
        [{"kind": "latency", "ms": 20}],
        [{"kind": "jitter", "ms": 20, "rail": "tcp0"}],
        [{"kind": "bandwidth", "mb_per_s": 20, "rail": "tcp1"}],
        [{"kind": "corruption", "rate": 0.05}],
        [{"kind": "corruption", "rate": 0.005, "part": "header"}],
        [{"kind": "death", "rate": 0.005}],
        [{"kind": "death", "from_s": 0.02, "to_s": 0.8}],
        [{"kind": "stall", "rail": "tcp0", "from_s": 0.02}],
        [{"kind": "stall", "from_s": 0.02, "to_s": 1.5}],
        [
            {"kind": "jitter", "ms": 2},
            {"kind": "corruption", "rate": 0.03},
            {"kind": "death", "rate": 0.003},
        ],
    ],
    ids=lambda faults: "+".join(fault["kind"] for fault in faults),
)
@pytest.mark.parametrize("rails", ["two", "one", "shm"])
def test_everything_arrives_whatever_is_injected(pairs, faults, rails):
    cables = {
        "one": [Cable("tcp0")],
        "two": [Cable("tcp0"), Cable("tcp1", bytes_per_s=3e8)],
        "shm": [Cable("tcp0"), Cable("shm", RailKind.SHM)],
    }[rails]
    if rails == "one" and any(fault.get("rail") == "tcp0" and fault["kind"] == "stall" for fault in faults):
        pytest.skip("nothing is left")
    pair = pairs(*cables, capacity=MIB, segment=32 * KIB, simulate=simulate(*faults))
    sizes = itertools.cycle([100, 5 * KIB, 300 * KIB, 64, 90 * KIB])
    for number in range(60):
        pair.a.send(next(sizes), key=number % 5)
        pair.b.send(next(sizes), key=number % 3)
        if number % 20 == 0:
            pair.a.link.send_control(b'{"n": %d}' % number)
    took = pair.settle(120.0)
    pair.check(pair.a, 60)
    pair.check(pair.b, 60)
    assert [message["n"] for message in pair.b.controls] == [0, 20, 40]
    assert took < 30.0
