"""Endpoints of two ranks over two RDMA rails, with TCP beside them: striping, failover, return, and the end."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from adaptra_plugin.errors import HandshakeError, PeerLostError, TransferTimeout, TransportError
from adaptra_plugin.transport import memfd, ring
from adaptra_plugin.transport.proxy import listeners, server
from tests.rdma import wires
from tests.rdma.hosts import both, started
from tests.rdma.pairs import MIB
from tests.rdma.ranks import BIG, DEADLINE_S, Rank

assert server  # loaded here, and not by each rank after its fork: the guest is slow
RESUMED_S = 1.0
"""Within which transfers go on elsewhere after a rail has died."""
SLACK_S = 1.0
"""The guest has one slow CPU for both ranks, both proxies and the wires."""
ROUND = (MIB,) * BIG
SEGMENT = 256 << 10


def pull(wire: int) -> None:
    """As if its cable were pulled: the ports of both ends go down. (With one end down only, the software device at the other
    one spins in the guest's kernel, on its only CPU, until its rail is closed.)"""
    for side in "ab":
        wires.cut(wire, side)


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_messages_are_spread_over_both_rails(proxy):
    def scenario(rank: Rank) -> None:
        rank.connect(proxy=proxy)
        assert set(rank.delivered()) >= {"rdma0", "rdma1", "tcp0"}, "connect has waited for both rails"
        sizes = (0, 1, 3000, 100_000, *ROUND, 3 * MIB)
        for _ in range(3):
            rank.round(sizes)
        rank.swap()
        got = rank.delivered()
        assert min(got["rdma0"], got["rdma1"]) > 2 * MIB, got
        # a moment in which the guest is too busy to acknowledge may send a little of it the other way
        assert sum(got[name] for name in got if name.startswith("tcp")) < (got["rdma0"] + got["rdma1"]) / 4, got
        assert rank.peer_stats()["damaged"] == 0 and not rank.peer_stats()["skipped"]

    both(scenario, maker=Rank)


def test_rings_grow_with_the_messages(monkeypatch):
    monkeypatch.setattr(ring, "WINDOW_BYTES", 2 * MIB)
    monkeypatch.setattr(memfd, "EXTENT_BYTES", MIB)

    def scenario(rank: Rank) -> None:
        rank.connect(ring_mib="auto", ring_max_mib=64)
        for sizes in ((1000, MIB), (3 * MIB, 100_000), (7 * MIB, MIB), (7 * MIB, 7 * MIB, 5 * MIB)):
            rank.round(sizes)
        for _ in range(40):  # a rail whose first answers came late gets less until it is measured anew
            got = rank.delivered()
            enough = min(got["rdma0"], got["rdma1"]) > 4 * MIB
            if rank.swap(enough) and enough:
                break
            rank.round((7 * MIB, 7 * MIB, 5 * MIB))
        assert enough, got
        for nic in next(factory.nics for factory in rank.endpoint._proxy._proxy.factories if hasattr(factory, "nics")):
            used = [sorted(extents) for extents in nic._rings.values()]
            assert max(map(len, used)) >= 7 and all(numbers[-1] <= 32 for numbers in used), used
        assert rank.peer_stats()["damaged"] == 0 and not rank.peer_stats()["skipped"]

    both(scenario, maker=Rank)


@pytest.mark.parametrize("how", ["link down", "silent"])
def test_a_rail_is_cut_in_the_middle_and_comes_back(how):
    """The other rail takes over within a second; nothing is lost, doubled or damaged; the rail is used again afterwards."""

    def scenario(rank: Rank) -> None:
        rank.connect()
        rank.round()
        cut_s = []

        def cut() -> None:
            if rank.side == "a":
                began = time.monotonic()
                if how == "silent":
                    wires.fault(0, "loss", "100%")
                else:
                    pull(0)
                cut_s.append(time.monotonic() - began)

        took = rank.round(during=cut)
        print(f"{rank.side}: {how}: transfers went on after {took:.2f} s (the cut took {sum(cut_s):.2f} s)")
        assert took < RESUMED_S + SLACK_S
        rank.round()
        rank.await_rails(rdma1="healthy")
        assert rank.delivered()["rdma1"] > MIB
        rank.swap()
        if rank.side == "a":
            wires.mend(0)
        rank.swap()
        back = rank.await_rails(rdma0="healthy", rdma1="healthy")
        print(f"{rank.side}: {how}: the rail was back after {back:.2f} s")
        rank.swap()
        for _ in range(3):
            rank.round()
        # how much is a matter of measured speed, and speed one of who has the guest's CPU
        used = rank.delivered()["rdma0"]
        assert used + rank.swap(used) > SEGMENT, "the rail that has come back carries data"

    both(scenario, maker=Rank)


@pytest.mark.parametrize("netem", [("delay", "20ms", "limit", "100000"), ("loss", "1%")], ids=["delay", "loss"])
def test_bad_wires_still_carry_everything(netem):
    def scenario(rank: Rank) -> None:
        rank.connect()
        rank.swap()
        if rank.side == "a":
            for wire in range(wires.COUNT):
                wires.fault(wire, *netem)
        rank.swap()
        for _ in range(3):
            rank.round((0, 5000, *ROUND))
        rank.swap()
        assert rank.peer_stats()["damaged"] == 0

    both(scenario, maker=Rank)


def test_tcp_carries_on_when_both_rails_are_cut():
    def scenario(rank: Rank) -> None:
        rank.connect()
        rank.round()

        def cut() -> None:
            if rank.side == "b":
                for wire in range(wires.COUNT):
                    pull(wire)

        took = rank.round(during=cut)
        print(f"{rank.side}: both cut: transfers went on over TCP after {took:.2f} s")
        assert took < RESUMED_S + SLACK_S
        rank.round()
        got = rank.delivered()
        assert sum(got[name] for name in got if name.startswith("tcp")) > 3 * MIB, got
        assert not any(got[name] for name in got if name.startswith("rdma")), got
        rank.swap()
        if rank.side == "b":
            for wire in range(wires.COUNT):
                wires.mend(wire)
        rank.swap()
        back = rank.await_rails(rdma0="healthy", rdma1="healthy")
        print(f"{rank.side}: both cut: the rails were back after {back:.2f} s")
        rank.swap()
        rank.round()
        rank.swap()
        again = rank.delivered()
        assert again["rdma0"] + again["rdma1"] > 3 * MIB, again

    both(scenario, maker=Rank)


def test_without_any_rail_one_error_comes_within_the_deadline():
    deadline_s = 4.0

    def scenario(rank: Rank) -> None:
        rank.connect(host=wires.address(rank.side, 0), deadline_s=deadline_s, reconnect_s=2.0)
        rank.round()
        rank.swap()
        if rank.side == "a":
            for wire in range(wires.COUNT):
                wires.cut(wire, "a")
        rank.swap()
        began = time.monotonic()
        with pytest.raises((PeerLostError, TransferTimeout), match=f"rank {1 - rank.rank}"):
            rank.round()
        assert time.monotonic() - began < deadline_s + 2 * SLACK_S
        rank.swap()

    both(scenario, maker=Rank)


def test_a_rank_that_is_killed_is_lost_soon():
    def scenario(rank: Rank) -> None:
        rank.connect()
        rank.round()
        if rank.side == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1"):
            rank.round()
        # the kernel has to take a process apart first that has registered a lot of memory
        assert time.monotonic() - began < 5 + SLACK_S < DEADLINE_S
        raise AssertionError("as it should be")

    with started(scenario, maker=Rank) as running:
        (_, report), _ = running
        assert report.poll(40)
        assert "AssertionError: as it should be" in report.recv()


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ((), "rdma_devices is empty|the other end offers none"),
        (("rxz",), "there is no RDMA device or address rxz|offers none"),
    ],
)
def test_rdma_is_demanded_and_cannot_be_had(devices, reason):
    def scenario(rank: Rank) -> None:
        mine = rank.create(**({"rdma_devices": devices} if rank.side == "b" else {}))
        began = time.monotonic()
        with pytest.raises(HandshakeError, match=f"rail is rdma, which is impossible: .*({reason})"):
            rank.meet(mine)
        assert time.monotonic() - began < 3
        rank.swap()

    both(scenario, maker=Rank)


def test_rdma_is_demanded_and_no_wire_works():
    def scenario(rank: Rank) -> None:
        if rank.side == "a":
            for wire in range(wires.COUNT):
                wires.fault(wire, "loss", "100%")
        mine = rank.create(handshake_timeout_s=1.0)
        with pytest.raises(
            TransportError,
            match=r"rail is rdma, which is impossible: .*(nobody has answered|was not heard|no acknowledgement)",
        ):
            rank.meet(mine)
        rank.swap()

    both(scenario, maker=Rank)


def _elsewhere(rank: Rank, folder) -> None:
    """As if the ranks were on different hosts."""
    (folder / rank.side).write_text(rank.side)
    listeners.BOOT_ID = folder / rank.side


def test_auto_does_without_a_rail_that_does_not_come_up_until_it_does(tmp_path):
    def scenario(rank: Rank) -> None:
        _elsewhere(rank, tmp_path)
        if rank.side == "a":
            wires.fault(1, "loss", "100%")
        mine = rank.create(rail="auto", handshake_timeout_s=1.5)
        rank.swap()  # how long it takes to start a proxy is not asked here
        began = time.monotonic()
        rank.meet(mine)
        assert time.monotonic() - began < 1.5 + 2 * SLACK_S
        found = rank.peer_stats()
        assert {"rdma0", "tcp0"} <= set(found["rails"])
        assert re.search("nobody has answered|was not heard|no acknowledgement", found["skipped"]["rdma1"])
        rank.round()
        got = rank.delivered()
        assert got["rdma0"] > 2 * MIB, got
        rank.swap()
        if rank.side == "a":
            wires.mend(1)
        rank.swap()
        rank.await_rails(rdma1="healthy")
        assert "rdma1" not in rank.peer_stats()["skipped"]

    both(scenario, maker=Rank)


def test_auto_on_one_host_takes_shared_memory():
    def scenario(rank: Rank) -> None:
        rank.connect(rail="auto")
        rank.round()
        assert set(rank.delivered()) == {"shm", "tcp0", "tcp1"}

    both(scenario, maker=Rank)
