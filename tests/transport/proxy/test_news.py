"""The end of a rail is told when the peer is known to live, and the end of a peer is no news of rails."""

from __future__ import annotations

from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.news import HOLD_S, RailNews
from tests.transport.proxy.memory import World


def news():
    world, told = World(), []
    world.now = 0.0
    return world, told, RailNews(world, lambda rail, state, why: told.append((world.now, rail, state)))


def test_what_does_not_end_is_told_at_once():
    _, told, found = news()
    assert not found.step("tcp0", State.SUSPECT, "silent") and not found.step("tcp0", State.HEALTHY, "it answers")
    assert told == [(0.0, "tcp0", State.SUSPECT), (0.0, "tcp0", State.HEALTHY)]


def test_the_end_of_rails_waits_for_a_sign_of_life_that_is_younger():
    world, told, found = news()
    world.run(1.0)
    assert found.step("tcp0", State.PAUSED, "closed")
    world.run(0.001)
    found.answered(0.9)  # to a ping that left before: the peer may have died since
    assert told == []
    found.answered(1.0005)
    assert [item[1:] for item in told] == [("tcp0", State.PAUSED)]
    world.run(10.0)
    assert len(told) == 1


def test_a_new_connection_is_one_and_comes_after_what_has_ended():
    _, told, found = news()
    for name in ("shm", "tcp0"):
        found.step(name, State.PAUSED, "closed")
    found.alive()
    found.step("tcp0", State.HEALTHY, "connected")
    assert [item[1:] for item in told] == [
        ("shm", State.PAUSED),
        ("tcp0", State.PAUSED),
        ("tcp0", State.HEALTHY),
    ]


def test_it_does_not_wait_for_ever():
    world, told, found = news()
    found.step("tcp0", State.PAUSED, "closed")
    world.run(0.5)
    found.step("tcp1", State.PAUSED, "closed")
    world.run(10.0)
    assert [name for _, name, _ in told] == ["tcp0", "tcp1"] and all(HOLD_S <= at < HOLD_S + 0.1 for at, _, _ in told)


def test_a_peer_that_is_lost_takes_the_news_of_its_rails_with_it():
    world, told, found = news()
    for name in ("shm", "tcp0", "tcp1"):
        found.step(name, State.PAUSED, "closed")
    found.drop()
    found.answered(1.0)
    world.run(10.0)
    assert told == []
