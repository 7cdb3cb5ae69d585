"""Rails that say nothing any more."""

from __future__ import annotations

import itertools

import pytest

from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.memory import Cable

KIB, MIB = 1 << 10, 1 << 20
ACTIVATION, GRADIENT = (Direction.ACTIVATION, 0), (Direction.GRADIENT, 0)


def shm(name="shm", **options):
    return Cable(name, RailKind.SHM, **options)


def test_a_black_hole_beside_a_rail_that_works(pairs):
    cables = [Cable(name, bytes_per_s=5e7) for name in ("tcp0", "tcp1")]
    pair = pairs(*cables, capacity=8 * MIB, segment=256 * KIB)
    hole = pair.cables["tcp0"]

    def keep_going():
        for end in (pair.a, pair.b):
            if len(end.waiting) < 4:
                end.send(MIB)
        pair.world.call_later(0.002, keep_going)

    keep_going()
    pair.world.run(2.0)
    hole.cut = True
    cut = pair.world.now
    pair.world.run(1.0)
    for end in (pair.a, pair.b):
        waits = [n for n in end.delivered if end.times[n] > cut]
        times = [cut, *(end.times[n] for n in waits)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert max(gaps) < 1.0
        # all that was on its way when it happened has come over the other rail
        letters = [letter for allocator in end.allocators.values() for letter in allocator.letters.values()]
        assert all(letter.number > max(n for n in end.peer.delivered) - 40 for letter in letters)
        history = [state for _, name, state, _ in end.states if name == "tcp0"]
        assert history[-2:] == [State.SUSPECT, State.PAUSED]
        assert "tcp0" not in end.link.connections
    assert pair.a.times[pair.a.delivered[-1]] > cut + 0.9
    hole.heal()
    pair.world.run(2.0)
    assert pair.a.states[-1][1:3] == ("tcp0", State.HEALTHY)
    assert pair.a.link.connections["tcp0"].delivered > 0


def test_a_goodbye_that_is_answered_late_is_the_end_and_nothing_more(pairs):
    pair = pairs(Cable("tcp0"))
    ended = []
    pair.a.finished = lambda: (ended.append(pair.world.now), pair.a.link.close())
    pair.cables["tcp0"].cut = True
    pair.a.link.say_goodbye()
    pair.world.run(0.6)
    assert pair.a.states[-1][1:3] == ("tcp0", State.SUSPECT) and not ended
    pair.cables["tcp0"].heal()
    pair.world.run(1.0)
    assert ended and not pair.a.link.connections


def test_pauses_grow_until_a_rail_has_worked_well(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"))
    pauses = []

    def fail():
        pair.cables["tcp0"].snap()
        pair.world.run(0.01)
        pauses.append(pair.a.link.health["tcp0"].until - pair.world.now)
        assert pair.world.run(60.0, lambda: "tcp0" in pair.a.link.connections)

    for _ in range(4):
        pair.world.run(0.5)
        fail()
    pair.world.run(11.0)
    fail()
    assert [round(pause, 1) for pause in pauses] == [0.2, 0.5, 1.0, 2.0, 0.2]


def test_a_rail_that_only_falls_silent_keeps_its_record_too(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"))
    pair.world.run(11.0)
    health = pair.a.link.health["tcp0"]
    for _ in range(2):
        health.failed(0.0)  # the next pause is 1 s
        health.answered(0.0)
    pair.cables["tcp0"].cut = True
    assert pair.world.run(4.0, lambda: health.state is State.PAUSED)
    assert health.until - pair.world.now == pytest.approx(0.25)


def test_silence_of_all_rails_closes_none_of_them(pairs):
    # a peer that is stopped for a while, or a host without a network
    pair = pairs(Cable("tcp0"), Cable("tcp1"), shm(), capacity=4 * MIB)
    for _ in range(20):
        pair.a.send(MIB)
    pair.world.run(0.001)
    for cable in pair.cables.values():
        cable.cut = True
    pair.world.run(8.0)
    assert pair.a.lost == pair.b.lost == []
    for cable in pair.cables.values():
        cable.heal()
    pair.settle(1.0)
    pair.check(pair.a, 20)
    pair.world.run(3.0)
    assert pair.a.lost == pair.b.lost == []
    assert {health.state for health in pair.a.link.health.values()} == {State.HEALTHY}


def test_a_peer_that_stood_still_and_answers_on_one_rail_after_the_other_loses_none(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), shm(), capacity=4 * MIB)
    pair.world.run(1.0)
    for number in range(20):
        pair.a.send(MIB)
        pair.world.run(0.001)
        if number == 10:
            for cable in pair.cables.values():
                cable.cut = True
    pair.world.run(1.5)
    for cable in pair.cables.values():
        cable.heal()
        pair.world.run(0.08)  # it has much to do
    pair.settle(2.0)
    pair.check(pair.a, 20)
    pair.world.run(2.0)
    assert pair.a.lost == pair.b.lost == []
    assert {health.state for health in pair.a.link.health.values()} == {State.HEALTHY}


def test_a_silent_peer_is_asked_now_and_then_and_not_all_the_time(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"))
    pair.world.run(1.0)
    asked = []
    ping = pair.a.link.ping
    pair.a.link.ping = lambda name: (asked.append((pair.world.now, name)), ping(name))[1]
    pair.a.send(KIB)
    for cable in pair.cables.values():
        cable.cut = True
    began = pair.world.now
    pair.world.run(1.5)
    assert 3 <= sum(name == "tcp0" for _, name in asked) <= 12
    asked.clear()
    pair.world.run(60.0)
    assert 60 <= sum(name == "tcp0" for _, name in asked) <= 160
    for cable in pair.cables.values():
        cable.heal()
    healed = pair.world.now
    assert pair.world.run(5.0, lambda: pair.a.settled)
    assert pair.world.now - healed < 0.7 and healed > began


def test_a_rail_is_not_given_up_for_one_of_which_nobody_knows_whether_it_works(pairs):
    # the slow one is patient and seems to be in order for longer than the fast one may be silent
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.3), capacity=4 * MIB)
    for _ in range(10):
        pair.a.send(MIB)
        pair.a.link.connections["tcp0"].inflight += 1 << 30
        pair.a.send(KIB)
        pair.a.link.connections["tcp0"].inflight -= 1 << 30
        pair.world.run(1.0)
    assert pair.a.link.connections["tcp1"].patience_s > 1.2
    lost = list(pair.a.lost)
    pair.a.send(MIB)
    for cable in pair.cables.values():
        cable.cut = True
    pair.world.run(1.1)
    assert pair.a.link.health["tcp0"].state is State.SUSPECT
    assert pair.a.link.health["tcp1"].state is State.HEALTHY
    assert pair.a.lost == lost
    for cable in pair.cables.values():
        cable.heal()
    pair.settle(3.0)


def test_a_rail_that_is_only_slow_is_left_in_peace_in_the_end(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.6))
    pair.world.run(40.0)
    given_up = len(pair.a.lost)
    assert given_up > 0
    for _ in range(10):
        pair.world.run(5.0)
        pair.a.link.connections["tcp0"].inflight += 1 << 30
        pair.a.send(KIB)
        pair.a.link.connections["tcp0"].inflight -= 1 << 30
    pair.settle()
    assert len(pair.a.lost) == given_up and "tcp1" in pair.a.link.connections


def test_what_waits_on_a_silent_rail_is_not_waited_for_when_another_one_is_back(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), capacity=4 * MIB)
    for cable in pair.cables.values():
        cable.cut = True
    for _ in range(4):
        pair.a.send(MIB)
    pair.world.run(30.0)  # by now both are asked only now and then
    pair.cables["tcp1"].heal()
    assert pair.settle() < 1.0
    pair.check(pair.a, 4)


def test_the_only_rail_turns_slow(pairs):
    # 1 s there and back is longer than an acknowledgement may take: nothing is lost, and it is not sent again for ever
    pair = pairs(Cable("tcp0"), capacity=4 * MIB)
    pair.a.send(MIB)
    pair.settle()
    pair.cables["tcp0"].latency_s = 0.5
    for _ in range(40):
        pair.a.send(MIB)
    pair.settle(60.0)
    pair.check(pair.a, 41)
    assert pair.a.lost == []
    retries = pair.a.link.retries
    for _ in range(10):
        pair.a.send(MIB)
    pair.settle(60.0)
    assert pair.a.link.retries == retries


def test_a_rail_that_carries_one_way_only_is_given_up(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), capacity=8 * MIB)
    pair.b.link.connections["tcp0"].rail.mute = True
    for _ in range(20):
        pair.a.send(MIB)
        pair.b.send(MIB)
    pair.settle(3.0)
    pair.check(pair.a, 20)
    pair.check(pair.b, 20)
    pair.world.run(1.0)
    assert pair.a.lost == ["tcp0"]
