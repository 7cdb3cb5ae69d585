"""The offset of two clocks, from pings over a way that is sometimes bad, with clocks that drift and are set."""

from __future__ import annotations

import random

import pytest

from adaptra_plugin.transport.clock import ClockOffset

EVERY_S = 2.0


class Hosts:
    """Two hosts and the way between them, simulated: the remote clock is `ahead` by something that changes."""

    def __init__(self, ahead=1000.0, rate=0.0):
        self.clock = ClockOffset()
        self.now, self._ahead, self._rate, self._since = 5000.0, ahead, rate, 5000.0
        self._random = random.Random(7)

    @property
    def ahead(self):
        return self._ahead + self._rate * (self.now - self._since)

    def turn(self, *, ahead=0.0, rate=None):
        """The remote clock jumps by `ahead` (s), or has another rate from now on."""
        self._ahead, self._since = self.ahead + ahead, self.now
        self._rate = self._rate if rate is None else rate

    def ping(self, there_s=1e-4, back_s=1e-4):
        sent = self.now
        self.now += there_s
        answered = self.now + self.ahead
        self.now += back_s
        self.clock.add(sent, answered, answered, self.now)

    def pings(self, seconds, there_s=1e-4, back_s=1e-4, every_s=EVERY_S):
        """With a jitter of up to as much again, each way."""
        until = self.now + seconds
        while self.now < until:
            begun = self.now
            self.ping(there_s * (1 + self._random.random()), back_s * (1 + self._random.random()))
            self.now = max(self.now, begun + every_s)

    def together(self, resumed, count, back_s=1e-4):
        """`count` pings that left evenly over a pause of the other end, and are all answered when it resumes."""
        begun = self.now
        for number in range(count):
            sent = begun + (resumed - begun) * number / count
            answered = resumed + number * 1e-6
            self.now = answered
            self.clock.add(sent, answered + self.ahead, answered + self.ahead, answered + back_s)
        self.now = resumed + back_s

    @property
    def error(self):
        """Of a delay that is measured now (s)."""
        return abs(self.clock.local(self.now + self.ahead, self.now) - self.now)


def test_a_pause_of_the_other_end_shifts_nothing_however_many_pings_are_answered_after_it():
    hosts = Hosts()
    hosts.pings(20)
    for count in (64, 1000):
        hosts.together(hosts.now + 1.5, count)
        assert hosts.error < 3e-4
        hosts.pings(10, there_s=0.03)  # and busy afterwards
        assert hosts.error < 1e-3


def test_a_pause_of_this_end_shifts_nothing():
    hosts = Hosts()
    hosts.pings(20)
    for number in range(200):
        hosts.ping(back_s=1.5 - number / 200)
    assert hosts.error < 1e-2 * 200 / 100  # 150 s of it: clocks could have drifted
    hosts.ping()
    assert hosts.error < 3e-4


@pytest.mark.parametrize("rate", [5e-6, -20e-6, 100e-6, -400e-6])
def test_drift_is_followed(rate):
    hosts = Hosts(rate=rate)
    worst = 0.0
    for _ in range(1800):
        hosts.pings(EVERY_S)
        worst = max(worst, hosts.error)
    assert worst < 1e-3


@pytest.mark.parametrize("rate", [0.0, 10e-6, -50e-6])
def test_drift_is_followed_through_a_link_that_turns_slow_in_one_direction(rate):
    """What a ping says is wrong by half the difference: the rate that is known carries on."""
    hosts = Hosts(rate=rate)
    hosts.pings(600)
    for _ in range(60):
        hosts.pings(10, there_s=0.036)
        assert hosts.error < 2e-3
    hosts.pings(4)
    assert hosts.error < 3e-4


def test_samples_age_by_time_and_not_by_number():
    hosts = Hosts()
    hosts.pings(20)
    hosts.pings(2, there_s=0.05, every_s=0.0005)  # thousands
    assert hosts.error < 1e-3
    hosts = Hosts(rate=15e-6)
    hosts.pings(20)
    hosts.pings(3600, there_s=0.01, back_s=0.01, every_s=600)  # few, far apart
    assert hosts.error < 0.01


@pytest.mark.parametrize("jump", [0.05, -1.3, 3600.0])
def test_a_clock_that_jumps_is_believed_at_once(jump):
    """A machine that was moved: its clock has not counted the pause. The ping that was under way says nonsense."""
    hosts = Hosts(rate=10e-6)
    hosts.pings(300)
    sent = hosts.now
    hosts.turn(ahead=jump)
    hosts.clock.add(sent, sent + hosts.ahead, sent + hosts.ahead + abs(jump), sent + 0.001)  # shorter than nothing
    hosts.ping()
    assert hosts.error < 3e-4
    hosts.pings(300)
    assert hosts.error < 3e-4


def test_another_rate_is_believed_too():
    hosts = Hosts(rate=30e-6)
    hosts.pings(600)
    hosts.turn(rate=-300e-6)
    for _ in range(60):
        hosts.pings(10)
        assert hosts.error < 3e-3
    hosts.pings(300)
    hosts.turn(rate=0.0)
    hosts.pings(20)
    assert hosts.error < 3e-3


def test_nonsense_is_ignored():
    hosts = Hosts()
    hosts.pings(10)
    for times in ((1e308, -1e308, 1e308, -1e308), (0.0, 0.0, 1e9, 1.0), (float("inf"), 0.0, 0.0, 0.0)):
        hosts.clock.add(*times)
    assert hosts.error < 3e-4
