"""Damage, duplicates, and room that is used again: nothing wrong is ever delivered."""

from __future__ import annotations

import json

from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.proxy.wire import Flag, FrameHeader, FrameKind
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.memory import Cable

KIB, MIB = 1 << 10, 1 << 20
ACTIVATION, GRADIENT = (Direction.ACTIVATION, 0), (Direction.GRADIENT, 0)


def shm(name="shm", **options):
    return Cable(name, RailKind.SHM, **options)


# --- damage, duplicates, and room that is used again


def test_room_is_not_free_while_a_rail_is_writing_to_it(pairs):
    """The most important property: a late copy of a segment never lands in room that belongs to another message."""
    pair = pairs(
        Cable("tcp0", bytes_per_s=1e9, piece_bytes=4 * KIB),
        Cable("tcp1", bytes_per_s=5e8),
        capacity=256 * KIB,
        segment=128 * KIB,
    )
    for end in (pair.a, pair.b):
        for connection in end.link.connections.values():
            connection.rail.discard = lambda header: False  # a rail that cannot let go
    # stop the first rail when it is in the middle of a segment
    pair.a.send(256 * KIB)
    inbox = pair.b.link._inboxes[ACTIVATION]
    slow = pair.b.link.connections["tcp0"]
    assert pair.world.run(1.0, lambda: bool(slow.placed) and next(iter(slow.placed.values())).at > 0)
    pair.world.run(5e-6)
    pair.cables["tcp0"].cut = True
    for _ in range(6):
        pair.a.send(256 * KIB)  # each one needs all of the ring
    pair.world.run(0.5)
    assert pair.b.delivered == [0]  # it has come over the other rail ...
    assert [m.writing for m in inbox.messages.values()] == [1]  # ... but its room is not given back
    pair.cables["tcp0"].heal()  # and now the rest of the segment comes
    pair.settle()
    pair.check(pair.a, 7)


def test_a_rail_lets_go_of_bytes_that_came_another_way(pairs):
    pair = pairs(
        Cable("tcp0", piece_bytes=4 * KIB), Cable("tcp1", bytes_per_s=5e8), capacity=256 * KIB, segment=128 * KIB
    )
    pair.a.send(256 * KIB)
    slow = pair.b.link.connections["tcp0"]
    assert pair.world.run(1.0, lambda: bool(slow.placed) and next(iter(slow.placed.values())).at > 0)
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
    assert pair.b.link._inboxes[ACTIVATION].duplicates > 0


def test_damaged_chunks_come_again(pairs):
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
    assert pair.b.link.corrupt > 5
    pair.a.send(KIB)
    pair.settle()
    assert len(pair.b.link.connections["tcp0"].ranges) <= 2  # what went again is not waited for


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
    assert pair.world.run(1.0, lambda: bool(slow.placed) and next(iter(slow.placed.values())).at > 0)
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


def test_a_declined_copy_does_not_count_in_place_of_a_damaged_one(pairs):
    pair = pairs()
    pair.a.link.connections["tcp0"].rail.mute = True
    pair.a.send(KIB)
    connection, link = pair.b.link.connections["tcp0"], pair.b.link
    header = FrameHeader(
        FrameKind.SEGMENT,
        connection.cumulative + 1,
        Flag.VERIFIED,
        message=0,
        total=KIB,
        length=KIB,
        checksum=1,
        behind=0,
    )
    (window,) = link.place(connection.rail, header)
    assert link.place(connection.rail, header) is None  # the same frame twice
    window[:] = bytes(KIB)
    link.arrived(connection.rail, header)  # its checksum is wrong
    link.arrived(connection.rail, header)  # of the second one nothing was kept
    assert pair.b.delivered == [] and connection.cumulative == header.sequence - 1


def test_a_rail_that_loses_frames_is_not_waited_for_for_ever(pairs):
    pair = pairs(segment=4 * KIB)
    rail = pair.a.link.connections["tcp0"].rail
    submit, count = rail.submit, iter(range(1 << 30))
    rail.submit = lambda frame: None if next(count) % 10 == 3 else submit(frame)
    for _ in range(300):
        pair.a.send(100 * KIB)
    pair.settle(120.0)
    pair.check(pair.a, 300)
    connection = pair.b.link.connections["tcp0"]
    pair.a.send(20 * KIB)
    pair.settle()
    assert len(connection.ranges) <= 3 and connection.cumulative > 1500
    assert len(pair.a.link.connections["tcp0"].under_way) < 5
