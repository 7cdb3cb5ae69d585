"""The reliable protocol, on rails of memory."""

from __future__ import annotations

import json

import pytest

from adaptra_plugin.transport.memfd import most_untold
from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.proxy.room import FREE_S
from adaptra_plugin.transport.proxy.wire import Flag, FrameHeader, FrameKind, MalformedFrame
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.ends import content
from tests.transport.proxy.memory import Cable

KIB, MIB = 1 << 10, 1 << 20
ACTIVATION, GRADIENT = (Direction.ACTIVATION, 0), (Direction.GRADIENT, 0)


def shm(name="shm", **options):
    return Cable(name, RailKind.SHM, **options)


# --- delivery


@pytest.mark.parametrize("nbytes", [1, 63, 64, 4096, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 1000 * KIB])
@pytest.mark.parametrize("kind", [RailKind.TCP, RailKind.SHM])
def test_messages_of_every_size_arrive_both_ways(pairs, nbytes, kind):
    pair = pairs(Cable("rail", kind))
    for end in (pair.a, pair.b):
        for _ in range(3):
            end.send(nbytes, lane=GRADIENT)
            end.send(nbytes, lane=ACTIVATION)
    pair.settle()
    for end in (pair.a, pair.b):
        pair.check(end, 6)
        assert end.references == (6 if kind is RailKind.SHM else 0)
        assert end.link.retries == end.link.corrupt == 0


def test_messages_wrap_around_the_end_of_the_ring(pairs):
    pair = pairs(capacity=256 * KIB, segment=48 * KIB)
    for _ in range(40):
        pair.a.send(100 * KIB)
    pair.settle()
    pair.check(pair.a, 40)
    assert pair.a.allocators[ACTIVATION].next > 10 * 256 * KIB


def test_a_message_as_large_as_the_ring(pairs):
    pair = pairs(capacity=256 * KIB)
    for _ in range(3):
        pair.a.send(256 * KIB)
    pair.settle()
    pair.check(pair.a, 3)


def test_by_reference_nothing_but_headers_travels(pairs):
    pair = pairs(shm())
    before = pair.cables["shm"].carried
    for _ in range(8):
        pair.a.send(100 * KIB)
    pair.settle()
    assert pair.b.references == 8
    assert pair.cables["shm"].carried - before < 8 * KIB


def test_data_go_by_reference_only_when_the_peer_has_mapped_the_rings(pairs):
    pair = pairs(Cable("tcp0"), shm())
    for end in (pair.a, pair.b):
        end.link.connections["shm"].ready = False
    pair.a.send(100 * KIB)
    pair.settle()
    assert pair.b.references == 0
    pair.a.link.make_ready("shm")
    pair.a.send(100 * KIB)
    pair.settle()
    assert pair.b.references == 1


def test_a_rail_by_reference_takes_over_what_waits_for_a_slow_one(pairs):
    pair = pairs(Cable("tcp0", bytes_per_s=1e6), shm(), capacity=16 * MIB, segment=MIB)
    for end in (pair.a, pair.b):
        end.link.connections["shm"].ready = False
    pair.a.send(8 * MIB)
    pair.world.run(0.05)
    assert pair.b.delivered == []
    pair.a.link.make_ready("shm")
    pair.world.run(0.05)
    assert pair.b.delivered == [0] and pair.b.references == 1
    pair.settle()
    pair.check(pair.a, 1)


def test_what_was_under_way_by_reference_goes_by_value_when_that_rail_fails(pairs):
    pair = pairs(Cable("tcp0"), shm(), capacity=4 * MIB)
    pair.cables["shm"].cut = True
    for _ in range(3):
        pair.a.send(MIB)
    pair.cables["shm"].down = True
    pair.cables["shm"].snap()
    pair.settle()
    pair.check(pair.a, 3)
    assert pair.b.references == 0


def test_messages_of_one_key_are_delivered_in_order_whatever_overtakes(pairs):
    # the first message goes a long way, those behind it a short one
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.15), segment=16 * KIB)
    pair.world.run(1.0)
    fast = pair.a.link.connections.pop("tcp0")
    pair.a.send(KIB, key="x")
    pair.a.link.connections["tcp0"] = fast
    for _ in range(3):
        pair.a.send(KIB, key="x")
    pair.a.send(KIB, key="y")
    pair.world.run(0.1)
    assert pair.b.delivered == [4]  # another key waits for nobody
    pair.settle()
    assert pair.b.delivered == [4, 0, 1, 2, 3]


def test_two_messages_that_wait_for_the_same_one_are_delivered_when_it_comes(pairs):
    # the second one is acknowledged before the third is sent, so both name the first
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.15))
    pair.world.run(1.0)
    fast = pair.a.link.connections.pop("tcp0")
    pair.a.send(KIB, key="x")
    pair.a.link.connections["tcp0"] = fast
    pair.a.send(KIB, key="x")
    pair.world.run(0.01)
    allocator = pair.a.allocators[ACTIVATION]
    assert [letter.acked for letter in allocator.letters.values()] == [False, True]
    pair.a.send(KIB, key="x")
    pair.settle()
    assert pair.b.delivered == [0, 1, 2]


def test_acknowledged_when_it_is_there_consumed_when_it_is_copied_out(pairs):
    pair = pairs()
    pair.b.hold_s = lambda: 1.0
    pair.a.send(200 * KIB)
    pair.world.run(0.5)
    (letter,) = pair.a.allocators[ACTIVATION].letters.values()
    assert letter.acked and not letter.consumed and not pair.a.link.unsent
    pair.world.run(1.0)
    assert not pair.a.allocators[ACTIVATION].letters


def test_a_full_ring_waits_for_its_reader(pairs):
    pair = pairs(capacity=128 * KIB)
    pair.b.hold_s = lambda: 0.2
    for _ in range(6):
        pair.a.send(64 * KIB)
    pair.world.run(0.1)
    assert pair.b.delivered == [0, 1]
    pair.settle()
    pair.check(pair.a, 6)


def test_small_messages_are_not_held_up_by_a_large_one(pairs):
    pair = pairs(Cable("tcp0", bytes_per_s=1e8), capacity=64 * MIB, segment=MIB)
    pair.a.send(40 * MIB)  # 0.4 s
    pair.world.run(0.05)
    sent = pair.world.now
    pair.a.send(4 * KIB)
    pair.a.link.send_control(b'{"hello": 1}')
    pair.world.run(0.1, lambda: bool(pair.b.delivered and pair.b.controls))
    assert pair.b.delivered == [1] and pair.b.controls == [{"hello": 1}]
    assert pair.world.now - sent < 0.06  # behind what the rail has taken already
    pair.settle()


def test_free_room_is_told_with_the_next_segment_or_after_a_moment_or_at_once_if_somebody_waits(pairs):
    pair = pairs()
    rail, frames = pair.b.link.connections["tcp0"].rail, []
    submit = rail.submit
    rail.submit = lambda frame: (frames.append(frame.header.kind), submit(frame))
    pair.a.send(KIB)
    pair.world.run(0.001)
    assert pair.b.delivered == [0] and frames == []
    pair.b.send(KIB)
    assert frames == [FrameKind.CONSUMED, FrameKind.SEGMENT]
    pair.settle()
    frames.clear()
    pair.a.send(KIB)
    pair.world.run(0.001)
    assert FrameKind.CONSUMED not in frames
    pair.world.run(FREE_S)
    assert frames == [FrameKind.CONSUMED]  # with the acknowledgement of the segment
    pair.a.link.stuck(*ACTIVATION, True)
    pair.a.send(KIB)
    pair.world.run(0.001)
    assert frames == [FrameKind.CONSUMED] * 2


def test_much_free_room_is_told_at_once(pairs):
    pair = pairs(capacity=64 * KIB)
    pair.a.send(most_untold(64 * KIB))
    pair.world.run(0.001)
    assert not pair.a.allocators[ACTIVATION].letters


# --- state


def test_control_messages_arrive_in_order_over_rails_of_different_speed(pairs):
    pair = pairs(Cable("tcp0", latency_s=0.05), Cable("tcp1"))
    for number in range(200):
        if number % 10 == 0:
            # the way they take changes all the time
            connections = pair.a.link.connections
            connections["tcp0" if number % 20 else "tcp1"].inflight += 1 << 30
            connections["tcp1" if number % 20 else "tcp0"].inflight %= 1 << 30
        pair.a.link.send_control(json.dumps({"n": number}).encode())
        pair.a.link.pump()
    assert pair.a.link.untaken.waiting > 0
    pair.settle()
    pair.world.run(1.0)
    assert [message["n"] for message in pair.b.controls] == list(range(200))
    assert pair.a.link.untaken.waiting == 0


def test_stuck_tells_the_last_state(pairs):
    pair = pairs(Cable("tcp0", latency_s=0.05), Cable("tcp1"))
    slow, fast = pair.a.link.connections["tcp0"], pair.a.link.connections["tcp1"]
    fast.inflight += 1 << 30
    for stuck in (True, False, True):
        pair.a.link.stuck(*GRADIENT, stuck)
        pair.a.link.pump()
    fast.inflight, slow.inflight = 0, 1 << 30
    pair.a.link.stuck(*GRADIENT, False)
    pair.a.link.pump()
    slow.inflight = 0
    pair.settle()
    assert pair.b.stuck == [(GRADIENT, False)]  # it came first, and those before it say nothing new


def test_goodbye_comes_after_everything_and_is_confirmed(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.1))
    for _ in range(5):
        pair.a.send(100 * KIB)
    pair.a.link.send_control(b"{}")
    pair.a.link.say_goodbye()
    while not pair.b.goodbyes:
        assert pair.world.run(5.0, lambda: bool(pair.b.goodbyes or pair.b.delivered))
        pair.world.run(0.001)
    assert sorted(pair.b.delivered) == list(range(5)) and pair.b.controls == [{}]
    assert pair.world.run(1.0, lambda: pair.a.done) and pair.b.goodbyes == 1


def test_pings_compare_the_clocks(pairs):
    pair = pairs()
    pair.world.run(5.0)
    assert pair.a.pongs >= 2 and pair.b.pongs >= 2


# --- several rails


def test_a_rail_ten_times_slower_gets_about_a_tenth_and_does_not_lengthen_the_transfer(pairs):
    def transfer(*cables):
        pair = pairs(*cables, capacity=64 * MIB, segment=MIB)
        for _ in range(24):
            pair.a.send(16 * MIB)
        took = pair.settle()
        pair.check(pair.a, 24)
        return took, [cable.carried / (24 * 16 * MIB) for cable in cables]

    alone, _ = transfer(Cable("tcp0", bytes_per_s=1e9))
    both, (fast, slow) = transfer(Cable("tcp0", bytes_per_s=1e9), Cable("tcp1", bytes_per_s=1e8))
    assert 0.05 < slow < 0.13 and fast > 0.85
    assert both < alone
    equal, shares = transfer(Cable("tcp0", bytes_per_s=1e9), Cable("tcp1", bytes_per_s=1e9))
    assert equal < 0.65 * alone and min(shares) > 0.4


def test_a_slow_rail_gets_nothing_of_what_the_fast_one_finishes_sooner(pairs):
    pair = pairs(
        Cable("tcp0", bytes_per_s=1e9), Cable("tcp1", bytes_per_s=1e7, latency_s=0.02), capacity=64 * MIB, segment=MIB
    )
    for _ in range(4):
        pair.a.send(16 * MIB)
    pair.settle()  # by now the speeds are known
    for number in range(5):
        pair.a.send(4 * MIB)
        assert pair.world.run(0.012, lambda number=number: len(pair.b.delivered) == 5 + number)
        pair.settle()


@pytest.mark.parametrize("when", [0.002, 0.005, 0.01])
def test_a_rail_fails_in_the_middle(pairs, when):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), capacity=16 * MIB, segment=256 * KIB)
    for number in range(12):
        pair.a.send(4 * MIB, key=number % 2)
        pair.b.send(3 * MIB)
    pair.world.run(when)
    pair.cables["tcp0"].snap()
    pair.settle(2.0)
    pair.check(pair.a, 12)
    pair.check(pair.b, 12)
    assert pair.a.lost == pair.b.lost == ["tcp0"]
    assert pair.a.link.retries > 0
    pair.world.run(0.5)
    assert sorted(pair.a.link.connections) == ["tcp0", "tcp1"]


def test_one_end_learns_over_the_other_rail_that_a_connection_is_closed(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"))
    pair.cables["tcp0"].cut = True
    pair.a.link.drop_rail("tcp0", "for a test")
    pair.world.run(0.01)
    assert pair.b.lost == ["tcp0"]


def test_late_news_of_a_closed_connection_do_not_end_the_next_one(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1", latency_s=0.3))
    pair.world.run(1.0)
    pair.cables["tcp0"].snap()
    pair.world.run(0.28)
    assert "tcp0" in pair.a.link.connections  # it is back before the news of its end
    pair.world.run(3.0)
    assert pair.a.lost == ["tcp0"] and pair.b.lost == ["tcp0"]


def test_the_last_rail_fails_and_comes_back(pairs):
    pair = pairs(Cable("tcp0"), capacity=4 * MIB)
    for _ in range(8):
        pair.a.send(2 * MIB)
        pair.b.send(MIB)
    pair.world.run(0.003)
    cable = pair.cables["tcp0"]
    cable.down = True
    cable.snap()
    pair.world.run(1.0)
    assert pair.a.link.connections == {} and pair.a.link.unsent
    pair.a.send(KIB)
    cable.down = False
    pair.settle(1.0)
    pair.check(pair.a, 9)
    pair.check(pair.b, 8)


# --- what makes no sense


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        (FrameHeader(FrameKind.SEGMENT, 1, lane=7, message=0, total=64, length=64), b"", "no neighbour"),
        (FrameHeader(FrameKind.SEGMENT, 0, message=0, total=64, length=64), b"", "has no number"),
        (
            FrameHeader(FrameKind.SEGMENT, 2, message=0, total=64, length=64),
            b"",
            "frame 2 of a rail came where 1 was due",
        ),
        (FrameHeader(FrameKind.STUCK, 0), b"", "has no number"),
        (FrameHeader(FrameKind.STUCK, 3), b"", "frame 3 of a rail came where 1 was due"),
        (FrameHeader(FrameKind.PONG, 1), b"", "came with a number"),
        (FrameHeader(FrameKind.ACK, ack=1 << 40), b"", "were sent"),
        (FrameHeader(FrameKind.STUCK, 1, ack=1 << 40), b"", "were sent"),
        (FrameHeader(FrameKind.CONSUMED, 1), b"12", "has 2 bytes"),
        (FrameHeader(FrameKind.CONSUMED, 1), bytes([9] * 16), "no such lane"),
        (FrameHeader(FrameKind.CONSUMED, 1, lane=7), b"", "no such lane"),
        (FrameHeader(FrameKind.CONTROL, 1, message=1), b"[1]", "instead of an object"),
        (FrameHeader(FrameKind.RAIL, 1), b"{", "not JSON"),
    ],
)
def test_frames_that_make_no_sense_are_refused(pairs, header, body, says):
    from adaptra_plugin.transport.proxy.control import checksum_of

    pair = pairs()
    connection = pair.a.link.connections["tcp0"]
    assert connection.came == 0
    if body:
        header.flags, header.length, header.checksum = Flag.VERIFIED, len(body), checksum_of([memoryview(body)])
    with pytest.raises(MalformedFrame, match=says):
        pair.a.link.arrived(connection.rail, header, body)


def test_what_two_messages_say_differs():
    assert len({content(number, 4096) for number in range(500)}) == 500
