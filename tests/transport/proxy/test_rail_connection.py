"""What a link knows of a rail: what is under way, speed, patience, and how far it is to be trusted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.transport.proxy.health import CLEAN_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, Health, State
from adaptra_plugin.transport.proxy.outbox import Item
from adaptra_plugin.transport.proxy.rail_connection import (
    BEST_TRIP_S,
    FIRST_SPEED,
    MAX_WINDOW,
    MIN_PATIENCE_S,
    MIN_WINDOW,
    RailConnection,
)
from adaptra_plugin.transport.proxy.wire import RANGE, FrameKind, MalformedFrame

KIB, MIB = 1 << 10, 1 << 20


class _Rail:
    name = "tcp0"
    by_reference = False


def item(length=MIB):
    return Item(FrameKind.SEGMENT, length)


def ranges(*pairs):
    return b"".join(RANGE.pack(*pair) for pair in pairs)


def test_acknowledgements_by_number_and_by_range():
    connection = RailConnection(_Rail())
    items = [item(10) for _ in range(8)]
    assert [connection.number(one, 0.0) for one in items] == [(n + 1, n) for n in range(8)]
    arrived, lost = connection.acknowledged(2, ranges((4, 5), (7, 7)), 0.001)
    assert [sent.item for sent in arrived] == [items[n] for n in (0, 1, 3, 4, 6)]
    assert lost == [] and connection.inflight == 30 and connection.live == 3
    assert connection.acknowledged(2, ranges((4, 5), (7, 7)), 0.001) == ([], [])


def test_a_frame_that_others_have_overtaken_is_lost_after_a_while():
    connection = RailConnection(_Rail())
    items = [item(10) for _ in range(3)]
    for one in items:
        connection.number(one, 0.0)
    assert connection.acknowledged(0, ranges((2, 2)), 0.01)[1] == []  # it may only be late
    _, lost = connection.acknowledged(0, ranges((2, 2)), 0.03)
    assert [sent.item for sent in lost] == [items[0]]  # nothing is known of the third one
    assert connection.inflight == 10 and connection.acknowledged(0, ranges((2, 2)), 0.05)[1] == []


def test_a_frame_that_went_another_way_counts_if_it_has_arrived_after_all():
    connection = RailConnection(_Rail())
    connection.number(one := item(), 0.0)
    assert [sent.item for sent in connection.take_all()] == [one] and connection.take_all() == []
    assert connection.inflight == connection.live == 0 and connection.oldest is None and connection.silent_s(1.0) == 1.0
    arrived, _ = connection.acknowledged(1, b"", 2.0)
    assert [sent.item for sent in arrived] == [one] and connection.silent_s(2.0) == 0.0
    assert connection.inflight == connection.live == 0 and connection.round_trip == 2.0


def test_what_went_another_way_and_has_arrived_is_not_waited_for():
    sender, receiver = RailConnection(_Rail()), RailConnection(_Rail())
    items = [item() for _ in range(4)]
    for one in items[:3]:
        sender.number(one, 0.0)
    sender.take_all()
    items[0].done = items[2].done = True
    number, behind = sender.number(items[3], 1.0)
    assert (number, behind) == (4, 2)  # the second one still is
    receiver.ack_through(number - behind - 1)
    assert receiver.came(4) and receiver.cumulative == 1 and receiver.acknowledgement() == ranges((4, 4))
    items[1].done = True
    number, behind = sender.number(item(), 1.0)
    receiver.ack_through(number - behind - 1)
    assert receiver.cumulative == 4 and not receiver.came(2) and receiver.came(5)
    assert receiver.ranges == [(0, 5)]


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(0, 45))
def test_numbers_that_have_come_are_kept_as_ranges(numbers, settled):
    connection, seen = RailConnection(_Rail()), set()
    for number in numbers:
        assert connection.came(number) == (number not in seen)
        seen.add(number)
    connection.ack_through(settled)
    seen |= set(range(1, settled + 1))
    found = [n for first, last in connection.ranges for n in range(max(1, first), last + 1)]
    assert found == sorted(seen)
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(connection.ranges))
    assert connection.ranges[0][0] == 0 and connection.ack_due == len(numbers)


def test_only_the_newest_ranges_are_told():
    connection = RailConnection(_Rail())
    for number in range(2, 202, 2):
        connection.came(number)
    assert connection.acknowledgement() == ranges(*((n, n) for n in range(138, 202, 2))) and connection.ack_due == 0


@pytest.mark.parametrize(
    ("cumulative", "body", "says"),
    [(9, b"", "frame 9 .* 3 were sent"), (0, ranges((1, 4)), "frame 4"), (0, b"x" * 17, "17 bytes"), (0, ranges((3, 2)), "3 to 2"),
     (0, ranges((0, 2)), "0 to 2"), (0, ranges(*((n, n) for n in range(1, 34))), "528 bytes")],
)  # fmt: skip
def test_acknowledgements_that_make_no_sense(cumulative, body, says):
    connection = RailConnection(_Rail())
    for _ in range(3):
        connection.number(item(), 0.0)
    with pytest.raises(MalformedFrame, match=says):
        connection.acknowledged(cumulative, body, 1.0)


def carry(connection, speed, trip, seconds, now=0.0):
    """Keeps the window of a simulated rail full."""
    free_at, acks = now, []
    end = now + seconds
    while now < end:
        while not connection.inflight or connection.inflight + MIB <= connection.window:
            number, _ = connection.number(item(), now)
            free_at = max(free_at, now) + MIB / speed
            acks.append((free_at + trip, number))
        now, number = acks.pop(0)
        connection.acknowledged(number, b"", now)
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
        number, _ = connection.number(item(100 * KIB), 0.1 * turn)
        connection.acknowledged(number, b"", 0.1 * turn + 0.03)
    assert connection.speed >= FIRST_SPEED
    # nor if something is always under way
    waiting = []
    for turn in range(100):
        now = 20.0 + 0.01 * turn
        waiting.append((now + 0.03, connection.number(item(100 * KIB), now)[0]))
        while waiting[0][0] <= now:
            connection.acknowledged(waiting.pop(0)[1], b"", now)
    assert connection.speed >= FIRST_SPEED


def test_bursts_after_a_pause_show_the_speed_of_a_long_way_too():
    connection = RailConnection(_Rail())
    connection.ponged(-0.02, 0.0)
    for turn in range(20):
        now = float(turn)
        numbers = [connection.number(item(), now)[0] for _ in range(2)]
        for part, number in enumerate(numbers):
            connection.acknowledged(number, b"", now + 0.02 + (part + 1) * MIB / 1e8)
    assert 0.9e8 < connection.speed < 1.1e8


def test_a_window_opens_with_what_has_been_delivered():
    connection = RailConnection(_Rail())
    connection.ponged(-0.036, 0.0)
    assert connection.window == MIN_WINDOW  # not what a rail of the assumed speed would carry in that time
    for turn in range(2, 5):
        numbers = []
        while connection.inflight + MIB <= connection.window:
            numbers.append(connection.number(item(), 0.036 * turn)[0])
        connection.acknowledged(numbers[-1], b"", 0.036 * (turn + 1))
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
        number, _ = connection.number(item(0), float(turn))
        connection.acknowledged(number, b"", turn + 0.5)
    assert 1.0 <= connection.patience_s < 1.2
    number, _ = connection.number(item(0), 30.0)
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
