"""Damage, what comes twice, and room that is used again: nothing wrong is ever delivered."""

from __future__ import annotations

import json

from adaptra_plugin.transport.proxy.control import checksum_of
from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.proxy.wire import Flag, FrameHeader, FrameKind
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.memory import Cable

KIB, MIB = 1 << 10, 1 << 20
ACTIVATION, GRADIENT = (Direction.ACTIVATION, 0), (Direction.GRADIENT, 0)


def shm(name="shm", **options):
    return Cable(name, RailKind.SHM, **options)


def test_a_rail_lets_go_of_bytes_that_came_another_way(pairs):
    pair = pairs(
        Cable("tcp0", piece_bytes=4 * KIB), Cable("tcp1", bytes_per_s=5e8), capacity=256 * KIB, segment=128 * KIB
    )
    pair.a.send(256 * KIB)
    slow = pair.b.link.connections["tcp0"]
    assert pair.world.run(1.0, lambda: slow.placed is not None and slow.placed.at > 0)
    pair.world.run(5e-6)
    pair.cables["tcp0"].cut = True
    for _ in range(6):
        pair.a.send(256 * KIB)
    pair.world.run(0.65)
    assert len(pair.b.delivered) > 3 and "tcp0" in pair.b.link.connections  # the room is free before the rail is closed
    pair.cables["tcp0"].heal()
    pair.settle()
    pair.check(pair.a, 7)


def test_a_whole_frame_that_comes_when_its_room_belongs_to_another_message_is_thrown_away(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1"), capacity=128 * KIB, segment=32 * KIB)
    pair.cables["tcp0"].cut = pair.cables["tcp1"].cut = False
    pair.a.send(128 * KIB)
    pair.cables["tcp0"].cut = True  # what it carries comes later
    assert pair.world.run(2.0, lambda: pair.b.delivered == [0])
    pair.b.hold_s = lambda: 0.01
    for _ in range(3):
        pair.a.send(128 * KIB)
    assert pair.world.run(2.0, lambda: len(pair.b.delivered) == 2)
    pair.cables["tcp0"].heal()
    pair.settle()
    pair.check(pair.a, 4)
    assert pair.b.link._arrivals.inboxes[ACTIVATION].duplicates > 0


def test_damaged_segments_come_again(pairs):
    pair = pairs(capacity=4 * MIB)
    rail = pair.a.link.connections["tcp0"].rail
    submit, seen = rail.submit, []

    def spoil(frame):
        if frame.header.kind == FrameKind.SEGMENT:
            seen.append(frame.header)
            if len(seen) % 3 == 0:
                body = bytearray(b"".join(frame.body))
                body[len(body) // 2] ^= 1
                frame.body = [memoryview(body)]
        submit(frame)

    rail.submit = spoil
    for _ in range(10):
        pair.a.send(300 * KIB)
    pair.settle()
    pair.check(pair.a, 10)
    assert pair.b.link.corrupt > 5 and pair.a.link.retries == pair.b.link.corrupt


def test_a_rail_that_damages_all_it_carries_is_left_while_it_answers_in_time(pairs):
    pair = pairs(Cable("tcp0"), Cable("tcp1", bytes_per_s=3e8), capacity=4 * MIB)
    for end in (pair.a, pair.b):
        rail = end.link.connections["tcp0"].rail
        submit = rail.submit

        def spoil(frame, submit=submit):
            if frame.header.kind == FrameKind.SEGMENT:
                body = bytearray(b"".join(frame.body))
                body[len(body) // 2] ^= 1
                frame.body = [memoryview(body)]
            submit(frame)

        rail.submit = spoil
    for _ in range(4):
        pair.a.send(300 * KIB)
    pair.world.run(0.5)
    assert len(pair.b.delivered) == 4
    assert pair.b.link.corrupt < 200
    assert any(name == "tcp0" and "damaged" in why for _, name, _, why in pair.a.states)
    pair.check(pair.a, 4)


def test_a_damaged_copy_beside_a_good_one_does_not_spoil_what_is_verified(pairs):
    """Two rails write the same segment; the one that comes first is right, the other one is damaged later on its way."""
    pair = pairs(
        Cable("tcp0", bytes_per_s=1e9, piece_bytes=4 * KIB),
        Cable("tcp1", bytes_per_s=5e8),
        capacity=256 * KIB,
        segment=128 * KIB,
    )
    pair.b.hold_s = lambda: 1.0
    pair.a.send(256 * KIB)
    slow = pair.b.link.connections["tcp0"]
    assert pair.world.run(1.0, lambda: slow.placed is not None and slow.placed.at > 0)
    pair.world.run(5e-6)
    pair.cables["tcp0"].cut = True
    pair.world.run(0.5, lambda: bool(pair.b.delivered))
    receive = slow.rail._receive

    def spoil(batch):
        receive([(bytes(len(piece)) if len(piece) == 4 * KIB else piece, last) for piece, last in batch])

    slow.rail._receive = spoil
    pair.cables["tcp0"].heal()
    pair.settle()
    pair.check(pair.a, 1)


def test_damaged_frames_of_state_come_again(pairs):
    pair = pairs()
    rail = pair.a.link.connections["tcp0"].rail
    submit, seen = rail.submit, []

    def spoil(frame):
        if frame.body and frame.header.kind in (FrameKind.CONTROL, FrameKind.CONSUMED, FrameKind.ACK):
            seen.append(frame.header.kind)
            if len(seen) % 2:
                body = bytearray(b"".join(frame.body))
                body[-1] ^= 4
                frame.body = [bytes(body)]
        submit(frame)

    rail.submit = spoil
    for number in range(10):
        pair.a.link.send_control(json.dumps({"n": number}).encode())
        pair.b.send(KIB)
        pair.world.run(0.01)
    pair.settle()
    assert [message["n"] for message in pair.b.controls] == list(range(10))
    pair.check(pair.b, 10)
    assert pair.b.link.corrupt >= 5


def test_a_copy_that_was_interrupted_does_not_count_as_arrived(pairs):
    """A rail is in the middle of a segment when another one begins with it, and fails before it is done."""
    pair = pairs(
        Cable("tcp0", piece_bytes=4 * KIB), Cable("tcp1", piece_bytes=4 * KIB), capacity=256 * KIB, segment=128 * KIB
    )
    pair.a.send(256 * KIB)
    slow, other = (pair.b.link.connections[name] for name in ("tcp0", "tcp1"))
    assert pair.world.run(1.0, lambda: slow.placed is not None and slow.placed.at > 0)
    at = slow.placed.at
    pair.world.run(5e-6)
    pair.cables["tcp0"].cut = True
    assert pair.world.run(1.0, lambda: other.placed is not None and other.placed.at == at)
    assert slow.placed is None  # one writes at a time
    pair.cables["tcp1"].snap()
    pair.cables["tcp0"].heal()  # the rest of the first copy is thrown away, so it has to come again
    pair.settle()
    pair.check(pair.a, 1)


def test_a_reference_ends_what_other_rails_are_in_the_middle_of(pairs):
    pair = pairs(Cable("tcp0", piece_bytes=4 * KIB), shm(), capacity=8 * MIB, segment=128 * KIB)
    for end in (pair.a, pair.b):
        end.link.connections["shm"].ready = False
    pair.a.send(8 * MIB)  # more than is under way at once
    slow = pair.b.link.connections["tcp0"]
    assert pair.world.run(1.0, lambda: slow.placed is not None and slow.placed.at > 0)
    pair.cables["tcp0"].cut = True
    pair.a.link.make_ready("shm")
    assert pair.world.run(0.01, lambda: pair.b.references == 1)
    assert slow.placed is None
    pair.a.send(8 * MIB)  # in the same room
    pair.cables["tcp0"].heal()
    pair.settle()
    pair.check(pair.a, 2)


def test_each_damaged_frame_is_asked_for_once(pairs):
    pair = pairs()
    connection, link = pair.b.link.connections["tcp0"], pair.b.link
    frames = []
    submit = connection.rail.submit
    connection.rail.submit = lambda frame: (frames.append(frame.header), submit(frame))
    header = FrameHeader(FrameKind.SEGMENT, 1, Flag.VERIFIED, message=0, total=KIB, length=KIB, checksum=1)
    pair.b.rail_state = lambda rail, state, why: link.ping(rail.name)  # acknowledges what has come
    (window,) = link.place(connection.rail, header)
    window[:] = bytes(KIB)
    link.arrived(connection.rail, header)  # its checksum is wrong
    assert pair.b.delivered == [] and connection.came == 1 and link.corrupt == 1
    assert [(frame.kind, frame.message) for frame in frames[:1]] == [(FrameKind.NACK, 1)]
    assert [(frame.kind, frame.ack) for frame in frames[1:]] == [(FrameKind.PING, 1)]
    header.sequence = 2
    header.checksum = checksum_of([memoryview(bytes(KIB))])
    (window,) = link.place(connection.rail, header)
    window[:] = bytes(KIB)
    pair.b.message = lambda direction, lane, found: pair.b.delivered.append(found.message)
    link.arrived(connection.rail, header)
    assert pair.b.delivered == [0] and len(frames) == 2
