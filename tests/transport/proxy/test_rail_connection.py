"""What a link knows of a rail: what is under way, speed, patience, and how far it is to be trusted."""

from __future__ import annotations

import math

import pytest

from adaptra_plugin.transport.proxy.health import CLEAN_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, Health, State
from adaptra_plugin.transport.proxy.outbox import SMALL, Item
from adaptra_plugin.transport.proxy.rail_connection import (
    ACK_SEGMENT_S,
    ACK_STATE_S,
    BEST_TRIP_S,
    FIRST_SPEED,
    MAX_WINDOW,
    MIN_PATIENCE_S,
    MIN_WINDOW,
    RailConnection,
)
from adaptra_plugin.transport.proxy.wire import FrameHeader, FrameKind, MalformedFrame

KIB, MIB = 1 << 10, 1 << 20


class _Rail:
    name = "tcp0"
    by_reference = False

    def __init__(self):
        self.frames = []

    def submit(self, frame):
        self.frames.append(frame)


def item(length=MIB):
    return Item(FrameKind.SEGMENT, length)


def send(connection, one, now):
    """The number of the frame."""
    connection.submit(one, FrameHeader(FrameKind.SEGMENT, length=one.length), [], now)
    return connection.rail.frames[-1].header.sequence


def test_one_number_acknowledges_all_before_it():
    connection = RailConnection(_Rail())
    items = [item(10) for _ in range(8)]
    assert [send(connection, one, 0.0) for one in items] == list(range(1, 9))
    assert [sent.item for sent in connection.acknowledged(3, 0.001)] == items[:3]
    assert connection.inflight == 50 and len(connection.under_way) == 5
    assert [sent.item for sent in connection.acknowledged(8, 0.002)] == items[3:]
    assert connection.inflight == 0 and connection.delivered == 80 and connection.oldest is None


def test_what_went_another_way_is_not_waited_for_but_its_answer_shows_how_slow_the_rail_is():
    connection = RailConnection(_Rail())
    send(connection, one := item(), 0.0)
    assert [sent.item for sent in connection.take_all()] == [one] and connection.take_all() == []
    assert connection.inflight == 0 and connection.oldest is None and connection.silent_s(1.0) == 1.0
    send(connection, item(), 1.0)
    assert connection.acknowledged(1, 2.0) == [] and connection.silent_s(2.0) == 1.0
    assert connection.inflight == MIB and connection.round_trip == 2.0


def test_a_frame_that_came_damaged_is_taken_back_and_no_longer_acknowledged():
    connection = RailConnection(_Rail())
    items = [item(10) for _ in range(3)]
    for one in items:
        send(connection, one, 0.0)
    assert connection.refused(2).item is items[1] and connection.refused(2) is None and connection.inflight == 20
    assert [sent.item for sent in connection.acknowledged(3, 1.0)] == [items[0], items[2]]


def test_an_acknowledgement_goes_with_whatever_leaves():
    connection = RailConnection(_Rail())
    for number in (1, 2):
        connection.take(FrameHeader(FrameKind.STUCK, number), 5.0)
    assert connection.came == 2 and connection.told == 0 and connection.ack_by == 5.0 + ACK_STATE_S
    connection.tell(FrameHeader(FrameKind.PING))
    assert connection.rail.frames[-1].header.ack == connection.told == 2 and connection.ack_by == math.inf
    send(connection, item(), 6.0)
    assert connection.rail.frames[-1].header.ack == 2


def test_few_bytes_are_acknowledged_soon_and_many_at_once():
    connection = RailConnection(_Rail())
    connection.take(FrameHeader(FrameKind.STUCK, 1), 5.0)
    connection.take(FrameHeader(FrameKind.SEGMENT, 2, length=1000), 5.0)
    assert connection.ack_by == 5.0 + ACK_SEGMENT_S
    connection.take(FrameHeader(FrameKind.SEGMENT, 3, length=SMALL), 5.001)
    assert connection.ack_by == 5.001


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_frames_come_in_order_or_the_rail_is_none(number):
    connection = RailConnection(_Rail())
    for expected in (1, 2):
        connection.take(FrameHeader(FrameKind.STUCK, expected), 0.0)
    with pytest.raises(MalformedFrame, match=f"frame {number} of a rail came where 3 was due"):
        connection.take(FrameHeader(FrameKind.STUCK, number), 0.0)


def test_an_acknowledgement_of_what_was_never_sent():
    connection = RailConnection(_Rail())
    for _ in range(3):
        send(connection, item(), 0.0)
    with pytest.raises(MalformedFrame, match=r"frame 9 .* 3 were sent"):
        connection.acknowledged(9, 1.0)


def carry(connection, speed, trip, seconds, now=0.0):
    """Keeps the window of a simulated rail full."""
    free_at, acks = now, []
    end = now + seconds
    while now < end:
        while not connection.inflight or connection.inflight + MIB <= connection.window:
            number = send(connection, item(), now)
            free_at = max(free_at, now) + MIB / speed
            acks.append((free_at + trip, number))
        now, number = acks.pop(0)
        connection.acknowledged(number, now)
    return now


@pytest.mark.parametrize(("speed", "trip"), [(1e8, 1e-3), (1e9, 1e-4), (5e9, 5e-5), (1e9, 0.03), (1e7, 0.01)])
def test_speed_and_window_find_what_the_rail_can_do(speed, trip):
    connection = RailConnection(_Rail())
    connection.ponged(-trip, 0.0)
    carry(connection, speed, trip, 2.0)
    assert 0.8 * speed < connection.speed < 1.3 * speed
    most = max(2 * MIN_WINDOW, 3 * speed * trip, 0.005 * speed)  # no more than waits for some ms
    assert min(MAX_WINDOW, max(MIN_WINDOW, 1.2 * speed * trip)) <= connection.window <= most


def test_little_traffic_does_not_make_a_rail_look_slow():
    connection = RailConnection(_Rail())
    for turn in range(100):
        number = send(connection, item(100 * KIB), 0.1 * turn)
        connection.acknowledged(number, 0.1 * turn + 0.03)
    assert connection.speed >= FIRST_SPEED
    # nor if something is always under way
    waiting = []
    for turn in range(100):
        now = 20.0 + 0.01 * turn
        waiting.append((now + 0.03, send(connection, item(100 * KIB), now)))
        while waiting[0][0] <= now:
            connection.acknowledged(waiting.pop(0)[1], now)
    assert connection.speed >= FIRST_SPEED


def test_bursts_after_a_pause_show_the_speed_of_a_long_way_too():
    connection = RailConnection(_Rail())
    connection.ponged(-0.02, 0.0)
    for turn in range(20):
        now = float(turn)
        numbers = [send(connection, item(), now) for _ in range(2)]
        for part, number in enumerate(numbers):
            connection.acknowledged(number, now + 0.02 + (part + 1) * MIB / 1e8)
    assert 0.9e8 < connection.speed < 1.1e8


def test_a_window_opens_with_what_has_been_delivered():
    connection = RailConnection(_Rail())
    connection.ponged(-0.036, 0.0)
    assert connection.window == MIN_WINDOW  # not what a rail of the assumed speed would carry in that time
    for turn in range(2, 5):
        numbers = []
        while connection.inflight + MIB <= connection.window:
            numbers.append(send(connection, item(), 0.036 * turn))
        connection.acknowledged(numbers[-1], 0.036 * (turn + 1))
    assert 8 * MIN_WINDOW < connection.window <= MAX_WINDOW


def test_a_queue_of_our_own_does_not_pass_for_a_long_way():
    connection = RailConnection(_Rail())
    connection.ponged(-0.001, 0.0)
    now = carry(connection, 1e8, 1e-3, 3.0)
    assert connection.round_trip > 0.015 > connection.best_trip
    now = carry(connection, 1e8, 0.05, 3 * BEST_TRIP_S, now)  # but a way that has become longer is noticed
    assert connection.best_trip > 0.05


def test_patience_follows_the_round_trips_seen():
    connection = RailConnection(_Rail())
    assert connection.patience_s == MIN_PATIENCE_S
    for turn in range(20):
        number = send(connection, item(0), float(turn))
        connection.acknowledged(number, turn + 0.5)
    assert 1.0 <= connection.patience_s < 1.2
    number = send(connection, item(0), 30.0)
    assert not connection.overdue(30.9) and connection.overdue(31.3)


def test_a_pong_answers_the_pings_before_it():
    connection = RailConnection(_Rail())
    connection.pinged = 1.0
    assert connection.oldest == 1.0 and connection.overdue(2.0)
    connection.ponged(0.5, 2.0)
    assert connection.pinged == 1.0
    connection.ponged(1.0, 2.0)
    assert connection.pinged is None and connection.answered_at == 2.0


# --- health


def test_the_life_of_a_rail():
    health = Health()
    assert health.state is State.PROBING
    assert health.answered(0.0) and not health.answered(0.0) and health.state is State.HEALTHY
    assert health.late(1.0) and not health.late(1.0) and health.state is State.SUSPECT
    assert health.answered(1.1) and health.state is State.HEALTHY
    health.late(2.0)
    assert health.failed(2.0) == FIRST_PAUSE_S and health.state is State.PAUSED
    assert health.until == 2.0 + FIRST_PAUSE_S
    assert not health.late(2.1)
    health.probing()
    assert health.state is State.PROBING


def test_pauses_double_up_to_a_limit_and_start_again_after_a_clean_time():
    health, now, pauses = Health(), 0.0, []
    for _ in range(10):
        pauses.append(health.failed(now))
        health.answered(now)
        now += 1.0
    assert pauses == [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(10)]
    health.late(now + CLEAN_S)
    assert health.failed(now + CLEAN_S + 1) == FIRST_PAUSE_S
