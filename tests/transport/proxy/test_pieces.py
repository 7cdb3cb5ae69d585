"""The parts of a link, each alone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.control import Ordered, Untaken, checksum_of, positions
from adaptra_plugin.transport.proxy.inbox import LaneInbox
from adaptra_plugin.transport.proxy.outbox import SMALL, Outbox
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, POSITIONS, FrameHeader, FrameKind, MalformedFrame, parse
from adaptra_plugin.transport.types import Direction

KIB, MIB = 1 << 10, 1 << 20


# --- inbox


@pytest.fixture
def inbox():
    receive_ring = Memfd.create(64 * KIB)
    yield LaneInbox(receive_ring, 32 * KIB)
    receive_ring.close()


def segment(message, total=64, at=0, length=None, floor=0, after=0):
    return FrameHeader(
        FrameKind.SEGMENT, 1, message=message, total=total, at=at, length=total if length is None else length,
        floor=floor, after=after // 64,
    )  # fmt: skip


def deliver(inbox, *headers):
    """What each segment makes deliverable."""
    found = []
    for header in headers:
        assert inbox.place(header) is not None
        found.append([message.message for message in inbox.filled(header)])
    return found


def test_chunks_in_any_order_make_a_message(inbox):
    parts = [segment(128, 300, at, 100) for at in (200, 0, 100)]
    assert deliver(inbox, *parts) == [[], [], [128]]
    assert inbox.place(parts[0]) is None and inbox.duplicates == 1


def test_a_chunk_around_the_end_of_the_ring_has_two_windows(inbox):
    windows = inbox.place(segment(64 * KIB - 64, 128, floor=64 * KIB - 64))
    assert [len(window) for window in windows] == [64, 64]


def test_room_is_free_when_the_message_is_released(inbox):
    assert not inbox.release(0)
    assert deliver(inbox, segment(0, 128, 0, 64), segment(0, 128, 64, 64)) == [[], [0]]
    assert inbox.release(0) and not inbox.release(0)
    assert not inbox.messages and inbox.gone == {0}


def test_a_message_that_is_done_with_is_known_until_the_sender_knows(inbox):
    deliver(inbox, segment(0), segment(64))
    assert inbox.release(0) and inbox.release(64) and inbox.gone == {0, 64}
    assert inbox.place(segment(0)) is None and inbox.place(segment(64)) is None
    assert inbox.place(segment(128, floor=64)) is not None  # the sender has heard of the first one
    assert inbox.gone == {64}
    assert inbox.place(segment(0)) is None  # before the floor


def test_a_reference_completes_whatever_has_come_by_value(inbox):
    deliver(inbox, segment(0, 300, 0, 100))
    (found,) = inbox.referenced(segment(0, 300))
    assert found.by_reference and found.missing == 0
    assert inbox.referenced(segment(0, 300)) == [] and inbox.place(segment(0, 300, 100, 100)) is None


def test_a_message_waits_for_the_one_before_it_even_if_nothing_of_that_has_come(inbox):
    assert deliver(inbox, segment(128, after=64), segment(64, after=64), segment(0)) == [[], [], [0, 64, 128]]
    assert not inbox._followers


def test_those_that_wait_are_delivered_oldest_first_down_the_whole_chain(inbox):
    # 64 waits for 0 and 128 for 64; 192 names 0, because 64 and 128 were acknowledged by then
    order = deliver(inbox, segment(64, after=64), segment(128, after=64), segment(192, after=192), segment(0))
    assert order == [[], [], [], [0, 64, 128, 192]]


def test_a_message_does_not_wait_for_one_that_is_delivered_or_gone(inbox):
    deliver(inbox, segment(0))
    assert deliver(inbox, segment(64, after=64)) == [[64]]
    inbox.release(0)
    assert deliver(inbox, segment(128, after=128)) == [[128]]
    assert deliver(inbox, segment(192, after=192, floor=64)) == [[192]]
    assert not inbox._followers


def test_messages_that_cannot_be_are_refused(inbox):
    with pytest.raises(MalformedFrame, match="at most 32768 fit"):
        inbox.place(segment(0, 33 * KIB))
    with pytest.raises(MalformedFrame, match="cannot hold it"):
        inbox.place(segment(64 * KIB, 64))
    inbox.place(segment(0, 64, 0, 10))
    with pytest.raises(MalformedFrame, match="another said 64"):
        inbox.place(segment(0, 65, 10, 10))


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=1), st.randoms(use_true_random=False))
def test_any_order_of_chunks_delivers_each_message_once_and_each_key_in_order(extra, rng):
    receive_ring = Memfd.create(16 * KIB)
    try:
        inbox = LaneInbox(receive_ring, KIB)
        segments = []
        for number in range(12):  # three keys: each message names the one before
            after = 3 * 256 if number >= 3 else 0
            segments += [segment(256 * number, 256, at, 64, after=after) for at in range(0, 256, 64)]
        segments += [segments[4 * number + part] for number, part in extra]
        rng.shuffle(segments)
        delivered = []
        for header in segments:
            if inbox.place(header) is not None:
                ready = inbox.filled(header)
                delivered += [found.message // 256 for found in ready]
                for found in ready:
                    assert inbox.release(found.message)
        assert sorted(delivered) == list(range(12))
        for key in range(3):
            assert [n for n in delivered if n % 3 == key] == [n for n in range(12) if n % 3 == key]
        assert not inbox.messages and not inbox._followers
    finally:
        receive_ring.close()


# --- outbox


def drain(outbox):
    found = []
    while outbox.peek() is not None:
        found.append(outbox.pop())
    return found


def add(outbox, message, total, after=0):
    outbox.add(Direction.GRADIENT, 0, message, total, 1.5, after)


def test_messages_are_cut_and_small_pieces_go_first():
    outbox = Outbox(1, MIB)
    add(outbox, 0, 2 * MIB + 5)
    add(outbox, 4 * MIB, 100)
    pieces = [(item.outgoing.message, item.at, item.length) for item in drain(outbox)]
    rest = 2 * MIB + 5 - SMALL - MIB
    assert pieces == [(0, 0, SMALL), (4 * MIB, 0, 100), (0, SMALL, MIB), (0, SMALL + MIB, rest)]
    assert outbox.waiting_bytes == 0


def test_what_goes_again_goes_first_and_never_twice():
    outbox = Outbox(1, 100 * KIB)
    add(outbox, 0, 64 * KIB)
    add(outbox, 64 * KIB, 64 * KIB)
    first = outbox.pop()
    outbox.again(first)
    outbox.again(first)
    assert outbox.waiting_bytes == 128 * KIB
    assert [item.outgoing.message for item in drain(outbox)] == [0, 64 * KIB]
    first.done = True
    outbox.again(first)
    assert outbox.peek() is None


def test_a_message_is_acknowledged_with_its_last_chunk_and_only_once():
    outbox = Outbox(1, 100)
    add(outbox, 0, SMALL + 150)
    items = drain(outbox)
    assert [outbox.acked(items[n]) is not None for n in (1, 1, 0, 2, 2)] == [False, False, False, True, False]
    assert outbox.whole(items[0].outgoing) is None and outbox.unacked == 0
    assert outbox.consumed(Direction.GRADIENT, 0, 0) is items[0].outgoing
    assert outbox.consumed(Direction.GRADIENT, 0, 0) is None


def test_what_is_needless_meanwhile_is_dropped():
    outbox = Outbox(1, 100)
    add(outbox, 0, 250)
    add(outbox, 256, 250)
    item = outbox.pop()
    outbox.whole(item.outgoing)
    assert {found.outgoing.message for found in drain(outbox)} == {256}
    assert outbox.waiting_bytes == 0


def test_headers_say_what_is_done_with_and_what_comes_before():
    outbox = Outbox(1, 100)
    for message in (0, 64, 128):
        add(outbox, message, 50, after=0 if message == 0 else 1)
    headers = [outbox.header(item) for item in drain(outbox)]
    assert [(header.floor, header.after) for header in headers] == [(0, 0), (0, 1), (0, 2)]
    outbox.consumed(Direction.GRADIENT, 0, 0)
    add(outbox, 192, 50)
    item = outbox.pop()
    assert outbox.header(item).floor == 64 and outbox.header(item).sent == 1.5
    for message in (64, 128, 192):
        outbox.consumed(Direction.GRADIENT, 0, message)
    assert outbox.header(item).floor == 192


# --- state frames


def test_control_messages_are_put_in_order():
    ordered, found = Ordered(), []
    numbers = list(range(1, 101)) * 2
    random.Random(3).shuffle(numbers)
    for number in numbers:
        found += [message["n"] for message in ordered.take(number, b'{"n": %d}' % number)]
    assert found == list(range(1, 101))
    assert ordered.news() == 100 and ordered.news() == 0


def test_the_missing_one_is_taken_even_if_no_more_can_be_held(monkeypatch):
    monkeypatch.setattr("adaptra_plugin.transport.proxy.control.MAX_HELD", 3)
    ordered = Ordered()
    for number in (2, 3, 4):
        assert list(ordered.take(number, b"{}")) == []
    with pytest.raises(MalformedFrame, match="message 5 came, 1 is missing"):
        list(ordered.take(5, b"{}"))
    assert len(list(ordered.take(1, b"{}"))) == 4


def test_what_the_other_endpoint_has_not_taken_is_counted():
    untaken = Untaken()
    assert [untaken.add(10), untaken.add(20), untaken.add(30)] == [1, 2, 3] and untaken.waiting == 60
    untaken.taken(2)
    untaken.taken(1)
    assert untaken.waiting == 30
    with pytest.raises(MalformedFrame, match="4 was taken, 3 were sent"):
        untaken.taken(4)


def test_lists_of_consumed_messages():
    body = POSITIONS.pack(1, 2, 640) + POSITIONS.pack(0, 0, 0)
    lanes = {(direction, lane) for direction in Direction for lane in range(3)}
    assert list(positions(body, lanes)) == [((Direction.GRADIENT, 2), 640), ((Direction.ACTIVATION, 0), 0)]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=3))
def test_a_checksum_does_not_depend_on_how_the_bytes_are_cut(data, cuts):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [memoryview(data)[a:b] for a, b in itertools.pairwise(edges)]
    assert checksum_of(pieces) == checksum_of([memoryview(data)])


# --- headers


def test_a_header_is_what_was_packed():
    header = FrameHeader(
        FrameKind.SEGMENT, 7, 3, Direction.GRADIENT, 1, message=1 << 40, total=5 * MIB, at=MIB, length=MIB, floor=1 << 39,
        checksum=(1 << 64) - 1, sent=12.5, after=9, ack=4,
    )  # fmt: skip
    raw = header.pack()
    assert len(raw) == HEADER_BYTES
    header.flags = 2
    assert parse(header.pack(), limit=5 * MIB, lanes=2) == header


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_header_with_a_wrong_byte_is_refused(at, wrong):
    raw = bytearray(FrameHeader(FrameKind.SEGMENT, 7, message=0, total=64, length=64).pack())
    raw[at] ^= wrong
    with pytest.raises(MalformedFrame):
        parse(bytes(raw), limit=MIB, lanes=1)
