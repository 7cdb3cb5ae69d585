"""Clocks, measured delays and injected slow links."""

import time

import pytest
import torch

from adaptra_plugin.config import SlowLink
from adaptra_plugin.transport.clock import ClockOffset

from .support import activation, gradient, line, until

pytestmark = pytest.mark.usefixtures("by_proxies")


def test_offset_comes_from_the_ping_with_the_shortest_way():
    clock = ClockOffset()
    clock.add(10.0, 115.0, 115.0, 20.0)  # 10 s round trip, says 100
    assert clock.offset == pytest.approx(100)
    clock.add(30.0, 130.6, 130.7, 31.1)  # 1 s round trip, says 100.1
    assert clock.offset == pytest.approx(100.1)
    assert clock.round_trip == pytest.approx(1.0)
    clock.add(40.0, 149.0, 149.0, 49.0)  # all the time on the way there: says 104.5, not believed
    assert clock.offset == pytest.approx(100.1)


def test_delay_is_never_negative():
    clock = ClockOffset()
    clock.add(0.0, 100.0, 100.0, 0.0)
    assert clock.delay(105.0, 5.25) == pytest.approx(0.25)
    assert clock.delay(105.0, 4.0) == 0.0


@pytest.mark.parametrize(("shift", "proxy"), [(-5000.0, "thread"), (5000.0, "thread"), (5000.0, "process")])
def test_hosts_whose_clocks_differ_measure_the_same_delay(shift, proxy):
    with line(2, offsets={1: shift}, proxy=proxy) as (first, second):
        assert first.stats()["peers"][1]["clock_offset_ms"] == pytest.approx(shift * 1e3, abs=50)
        delays = []
        for number in range(10):
            first.channel(1).send(activation(number), [torch.ones(10)])
            delays.append(second.channel(0).recv(activation(number)).wait().delay_ms)
        assert 0 <= min(delays) < 50


def test_slow_link_delays_both_directions_without_blocking_and_transfers_overlap():
    latency_ms, count = 300.0, 12
    slow = SlowLink(src=0, dst=1, latency_ms=latency_ms, from_iteration=3)
    with line(3, links=[slow], connections_per_direction=1) as endpoints:
        first, second, third = endpoints
        for e in endpoints:
            e.set_iteration(3)
        works = [second.channel(0).recv(activation(number)) for number in range(count)]
        back = first.channel(1).recv(gradient(0))
        start = time.monotonic()
        sent = [first.channel(1).send(activation(number), [torch.ones(1000)]) for number in range(count)]
        second.channel(0).send(gradient(0), [torch.ones(10)])
        assert time.monotonic() - start < latency_ms / 1e3  # send does not wait for the link
        assert not any(work.ready() for work in (*works, *sent))
        second.channel(2).send(activation(0, stage=2), [torch.ones(1)])
        assert third.channel(1).recv(activation(0, stage=2)).wait().delay_ms < latency_ms  # another link is not slow
        delays = [work.wait().delay_ms for work in works]
        took_ms = (time.monotonic() - start) * 1e3
        assert all(delay >= latency_ms - 20 for delay in delays)
        assert took_ms < count * latency_ms / 2  # one after the other they would take count * latency_ms
        assert back.wait().delay_ms >= latency_ms - 20
        for e in endpoints:
            e.set_iteration(2)
        first.channel(1).send(activation(0, step_id=1), [torch.ones(1)])
        assert second.channel(0).recv(activation(0, step_id=1)).wait().delay_ms < latency_ms / 2


def test_frames_keep_their_order_when_a_link_heals():
    slow = SlowLink(src=0, dst=1, latency_ms=100, to_iteration=1)
    with line(2, links=[slow], connections_per_direction=1) as (first, second):
        first.channel(1).send(activation(0), [torch.zeros(1)])
        first.set_iteration(1)
        first.channel(1).send(activation(0), [torch.ones(1)])
        got = [second.channel(0).recv(activation(0)).wait() for _ in range(2)]
        assert [int(m.tensors[0]) for m in got] == [0, 1]


def test_close_sends_what_a_slow_link_still_holds():
    slow = SlowLink(src=0, dst=1, latency_ms=150)
    with line(2, links=[slow]) as (first, second):
        first.channel(1).send(activation(0), [torch.ones(1)])
        first.close()
        assert second.channel(0).recv(activation(0)).wait().delay_ms >= 130


def test_stats_count_per_peer_and_direction():
    with line(2) as (first, second):
        for number in range(3):
            first.channel(1).send(activation(number), [torch.zeros(16)])
            second.channel(0).recv(activation(number)).wait()
        second.channel(0).send(gradient(0), [])
        first.channel(1).recv(gradient(0)).wait()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["messages"] == 3)
        there, back = (e.stats()["peers"][peer]["directions"] for e, peer in ((first, 1), (second, 0)))
        # header 64, description 64, payload 64
        assert there["activation"]["sent"] == {
            "messages": 3,
            "bytes": 576,
            "blocked_ms": 0.0,
            "full": 0,
            "drained_early": 0,
        }
        assert back["activation"]["received"]["bytes"] == 576
        assert (there["gradient"]["received"]["messages"], back["gradient"]["sent"]["messages"]) == (1, 1)
        assert first.stats()["refused_connections"] == 0
