"""The way to the other end of a wire: found out before a queue pair is connected, so that nothing stands still for it."""

from __future__ import annotations

import subprocess
import time
from unittest.mock import Mock

import pytest

from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.rails.rdma import arp
from adaptra_plugin.transport.proxy.rails.rdma.arp import ArpQuery
from adaptra_plugin.transport.proxy.rails.rdma.nics import MAX_RETIRED, Nic
from adaptra_plugin.transport.proxy.rails.rdma.rail import RdmaRail
from tests.rdma import wires
from tests.rdma.hosts import both
from tests.rdma.pairs import ends
from tests.rdma.ranks import Rank

HERE, THERE = wires.address("a", 0), wires.address("b", 0)


@pytest.fixture
def loop():
    found = Loop()
    yield found
    found.close()


def flush() -> None:
    subprocess.run(["ip", "neigh", "flush", "all"], check=True, timeout=10)


def looked(loop: Loop, arp_query: ArpQuery, patience_s: float = 3.0) -> float:
    """Looks until the way is known, or patience ends; how long that took (s)."""
    began = time.monotonic()
    end = loop.call_later(patience_s, loop.stop)
    arp_query.when_known(loop.stop)
    loop.run()
    loop._stopped = False
    end.cancel()
    return time.monotonic() - began


def test_it_is_found_at_once_and_a_queue_pair_connects_without_waiting(loop):
    flush()
    arp_query = ArpQuery(loop, "a0", HERE, THERE)
    assert not arp_query.known
    assert looked(loop, arp_query) < 1.0 and arp_query.known
    began = time.monotonic()
    with ends():
        # had it to look for the way itself, this would take a second
        assert time.monotonic() - began < 0.95


def test_nobody_answers_until_the_wire_is_mended(loop):
    wires.fault(0, "loss", "100%")
    flush()
    arp_query = ArpQuery(loop, "a0", HERE, THERE)
    assert looked(loop, arp_query, 0.5) >= 0.5 and not arp_query.known
    assert str(arp_query) == f"nobody has answered for {THERE} on a0 (ARP or neighbour discovery)"
    wires.mend(0)
    assert looked(loop, arp_query) < 2.0 and arp_query.known
    arp_query.close()


def test_what_is_closed_calls_nobody(loop):
    wires.fault(0, "loss", "100%")
    flush()
    arp_query = ArpQuery(loop, "a0", HERE, THERE)
    arp_query.when_known(lambda: pytest.fail("nobody wants to know"))
    arp_query.close()
    wires.mend(0)
    loop.call_later(0.5, loop.stop)
    loop.run()


@pytest.mark.parametrize("what", ["device", "link"])
def test_there_is_no_way_while_the_link_is_down(loop, what):
    wires.cut(0, "a" if what == "device" else "b")
    arp_query = ArpQuery(loop, "a0", HERE, THERE)
    assert looked(loop, arp_query, 0.4) >= 0.4 and not arp_query.known
    arp_query.close()


@pytest.mark.parametrize(
    ("interface", "source", "target"),
    [
        ("lo", "127.0.0.1", "127.0.0.1"),
        (None, HERE, THERE),
        ("b0", HERE, THERE),  # as in another network namespace
        ("a0", HERE, "fe80::1"),
        ("a0", HERE, "fd00::1"),
        ("a0", "", ""),
    ],
)
def test_what_needs_no_answer_or_cannot_be_asked_counts_as_known(loop, interface, source, target):
    flush()
    assert ArpQuery(loop, interface, source, target).known


def test_a_kernel_that_does_not_tell_is_not_waited_for(loop, monkeypatch):
    flush()

    def refuse(*_: object) -> None:
        raise arp.Unanswerable("not here")

    monkeypatch.setattr(arp, "_asked", refuse)
    assert ArpQuery(loop, "a0", HERE, THERE).known


def test_behind_a_router_the_router_is_what_has_to_be_known(loop):
    flush()
    far = "203.0.113.9"
    subprocess.run(["ip", "route", "add", far, "via", THERE, "dev", "a0", "table", "99"], check=True, timeout=10)
    try:
        arp_query = ArpQuery(loop, "a0", HERE, far)
        assert not arp_query.known
        assert looked(loop, arp_query) < 1.0 and arp_query.known
    finally:
        subprocess.run(["ip", "route", "del", far, "table", "99"], check=True, timeout=10)


def test_ipv6_is_asked_as_well(loop):
    for address, device in (("fd00::1", "a0"), ("fd00::2", "b0")):
        subprocess.run(["ip", "addr", "add", f"{address}/64", "dev", device, "nodad"], check=True, timeout=10)
    try:
        subprocess.run(["ip", "-6", "neigh", "flush", "dev", "a0"], check=True, timeout=10)
        arp_query = ArpQuery(loop, "a0", "fd00::1", "fd00::3")  # nobody is there
        assert looked(loop, arp_query, 0.3) >= 0.3 and not arp_query.known
        arp_query.close()
        arp_query = ArpQuery(loop, "a0", "fd00::1", "fd00::2")
        assert looked(loop, arp_query) < 2.0 and arp_query.known
    finally:
        for address, device in (("fd00::1", "a0"), ("fd00::2", "b0")):
            subprocess.run(["ip", "addr", "del", f"{address}/64", "dev", device], check=True, timeout=10)


def test_rails_that_cannot_come_back_hold_up_nobody():
    """The other rail carries on at its speed while one that nobody answers on is tried again and again."""

    def scenario(rank: Rank) -> None:
        rank.connect(handshake_timeout_s=1.0)
        rank.round()
        rank.swap()
        if rank.side == "a":
            wires.fault(1, "loss", "100%")
            wires.cut(1, "a")
            subprocess.run(["ip", "link", "set", "a1", "up"], check=True, timeout=10)
            flush()
        rank.swap()
        slowest, until = 0.0, time.monotonic() + 5.0
        while rank.swap(going := time.monotonic() < until) and going:
            slowest = max(slowest, rank.round((4096,) * 4))
        print(f"{rank.side}: the slowest of {rank.step_id} rounds took {slowest:.2f} s")
        assert slowest < 0.95  # a queue pair that is connected too early holds everything up for a second
        assert rank.peer_stats()["rails"]["rdma1"]["state"] != "healthy"

    both(scenario, maker=Rank)


def test_pairs_are_given_back_after_a_while(loop, monkeypatch):
    monkeypatch.setattr("adaptra_plugin.transport.proxy.rails.rdma.nics.RETIRED_S", 0.3)
    nic = Nic(loop, "rxa0")
    before = len(nic.device._children)
    made = []
    for _ in range(MAX_RETIRED + 2):
        queue = nic.device.completions(8)
        made.append(nic.device.queue_pair(queue, 4, 4))
        nic.retire(made[-1], [made[-1], queue])
    assert len(nic.device._children) - before == 2 * MAX_RETIRED
    assert made[-1].state == "ERR"
    loop.call_later(0.5, loop.stop)
    loop.run()
    assert len(nic.device._children) == before
    nic.retire(made[-1], [nic.device.completions(8)])
    nic.close()
    assert not nic.device._children


def test_a_rail_that_was_never_connected_is_given_back_at_once(loop):
    nic = Nic(loop, "rxa0")
    before = len(nic.device._children)
    rail = RdmaRail("rdma0", Mock(), nic, {})
    assert len(nic.device._children) > before
    rail.close()
    assert len(nic.device._children) == before
    nic.close()
