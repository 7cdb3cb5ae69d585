"""Ranks that do not share a loopback, or a machine but no network: where they listen, and what they say if nobody comes."""

from __future__ import annotations

import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.runtime.rendezvous import Rendezvous
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import Address, Endpoint, PeerInfo, bind
from adaptra_plugin.transport.bind import Place, is_loopback, reachable_address
from tests.forked import run_ranks

from . import namespaces
from .support import activation, config, endpoint, everywhere, gradient

HERE, THERE = "boot net:[1]", "boot net:[2]"
OWN = {"10.0.0.9": "10.0.0.1", "192.168.1.9": "192.168.1.1", "fd00::9": "fd00::1", bind.ELSEWHERE[0]: "172.16.0.1"}
"""From which address packets leave this host, by where they go."""


@pytest.fixture
def routes(monkeypatch):
    """A routing table like `OWN`; everything else leads nowhere."""
    known = dict(OWN)

    def towards(host):
        if host not in known:
            raise TransportError(f"no local address leads to {host!r}")
        return known[host]

    monkeypatch.setattr(bind, "local_address_towards", towards)
    return known


@pytest.mark.parametrize(
    ("mine", "others", "chosen"),
    [
        ("10.0.0.1", [(THERE, "192.168.1.9")], "10.0.0.1"),  # others reach it already
        ("127.0.0.1", [(HERE, "127.0.0.1")], "127.0.0.1"),  # one host
        ("::1", [(HERE, "::1")], "::1"),
        ("127.0.0.1", [(HERE, "127.0.0.1"), (THERE, "10.0.0.9")], "10.0.0.1"),
        ("127.0.1.1", [(THERE, "192.168.1.9"), (THERE, "10.0.0.9")], "192.168.1.1"),  # several networks: theirs
        ("::1", [(THERE, "fd00::9")], "fd00::1"),
        ("::ffff:127.0.1.1", [(THERE, "10.0.0.9")], "10.0.0.1"),
        ("127.0.0.1", [(THERE, "127.0.0.1"), (THERE, "10.0.0.9")], "10.0.0.1"),  # one of them says nothing
        ("127.0.0.1", [(THERE, "10.99.0.9"), (THERE, "fd00::9")], "fd00::1"),  # no way to the first
        ("127.0.0.1", [(THERE, "127.0.0.1")], "172.16.0.1"),  # nobody says anything: the way out
    ],
)
def test_the_address_that_others_reach(routes, mine, others, chosen):
    assert reachable_address(Place(HERE, mine), [Place(*other) for other in others]) == chosen


def test_without_any_way_out_it_stays_loopback(routes):
    routes.clear()
    assert reachable_address(Place(HERE, "127.0.0.1"), [Place(THERE, "10.0.0.9")]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.1.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True), ("10.0.0.1", False)],
)
def test_what_is_loopback(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("configured", "chosen"), [("auto", "10.0.0.1"), ("0.0.0.0", "10.0.0.1"), ("127.0.0.5", "127.0.0.5")]
)
def test_ranks_of_a_master_whose_name_is_loopback_hear_of_the_other_hosts(monkeypatch, configured, chosen):
    """The master's name has the address 127.0.1.1 on its own host (Debian), and the right one elsewhere."""
    here = {0: HERE, 1: HERE, 2: THERE}
    monkeypatch.setattr(Place, "here", classmethod(lambda cls, address: cls(here[rank_of[address]], address)))
    rank_of = {"127.0.0.1": 0, "127.0.0.2": 1, "10.0.0.9": 2, "127.0.0.5": 0}
    monkeypatch.setattr(bind, "local_address_towards", lambda host: {"10.0.0.9": "10.0.0.1"}[host])
    store, topology = HashStore(), [[0, 1, 2]]

    def ask(rank):
        given = configured if rank == 0 else ["127.0.0.2", "10.0.0.9"][rank - 1]
        return Rendezvous(store, "7", rank, 10.0).bind_host(Topology.of(rank, topology), given)

    monkeypatch.setattr(
        "adaptra_plugin.runtime.rendezvous.choose_bind", lambda how, _: how.replace("auto", "127.0.0.1")
    )
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, range(3)))
    assert found == [chosen, "127.0.0.2", "10.0.0.9"]


def test_a_wildcard_says_the_address_that_others_reach(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    e = Endpoint(PeerInfo(0, 0, "n"), config(bind="0.0.0.0"), b"x" * 32, bind_host="10.1.2.3")
    try:
        assert e.address.host == "10.1.2.3"
    finally:
        e.close()


def test_shared_memory_that_cannot_be_reached_is_done_without(caplog):
    """Two pods of one machine: the same boot, but nobody is behind the name of the other one's socket."""
    caplog.set_level(logging.INFO, "adaptra.transport")
    ends = [endpoint(rank, config()) for rank in (0, 1)]
    peers = {end.me.rank: (end.me, replace(end.endpoint_info, unix="adaptra-nobody")) for end in ends}
    try:
        errors = everywhere(*(lambda e=e: e.connect(peers, neighbours=[1 - e.me.rank], coordinator=0) for e in ends))
        assert errors == [None, None]
        ends[0].channel(1).send(activation(0), [torch.ones(3)])
        assert ends[1].channel(0).recv(activation(0)).wait().tensors[0].sum() == 3
        rails = [set(end.stats()["peers"][1 - end.me.rank]["rails"]) for end in ends]
        assert rails == [{"tcp0", "tcp1"}] * 2
        said = [record.getMessage() for record in caplog.records if "connected:" in record.getMessage()]
        assert len(said) == 2 and all("no shm: " in line and "in another network namespace?" in line for line in said)
    finally:
        everywhere(*(end.close for end in ends))


def test_shared_memory_that_is_demanded_and_cannot_be_reached_is_an_error():
    ends = [endpoint(rank, config(rail="shm")) for rank in (0, 1)]
    peers = {end.me.rank: (end.me, replace(end.endpoint_info, unix="adaptra-nobody")) for end in ends}
    try:
        began = time.monotonic()
        errors = everywhere(*(lambda e=e: e.connect(peers, neighbours=[1 - e.me.rank], coordinator=0) for e in ends))
        assert time.monotonic() - began < 10
        assert all("rail is shm, which is impossible" in str(error) for error in errors), errors
    finally:
        everywhere(*(end.close for end in ends))


def test_a_rank_that_nobody_can_reach_says_where_it_listens():
    first = endpoint(0, config(connect_deadline_s=0.3))
    try:
        endpoint_info = replace(first.endpoint_info, boot="another host")
        with pytest.raises(TransportError) as caught:
            first.connect(
                {0: (first.me, first.endpoint_info), 1: (PeerInfo(1, 1, "n1"), endpoint_info)},
                neighbours=[1],
                coordinator=0,
            )
        text = str(caught.value)
        assert f"It listens on {first.endpoint_info}, loopback, which only its own host reaches" in text
        assert "adaptra.transport.bind" in text and "it has not dialled this rank; that is loopback" in text
    finally:
        first.close()


def test_who_dials_a_loopback_address_of_another_host_hears_that(caplog):
    second = endpoint(1, config())
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    endpoint_info = replace(second.endpoint_info, boot="another host", addresses=(Address("127.0.0.1", port),))
    try:
        with pytest.raises(PeerLostError) as caught:
            second.connect(
                {0: (PeerInfo(0, 0, "n0"), endpoint_info), 1: (second.me, second.endpoint_info)},
                neighbours=[0],
                coordinator=0,
            )
        assert f"nothing listens at 127.0.0.1:{port}" in str(caught.value)
        assert "loopback, which only its own host reaches" in str(caught.value)
        assert "firewall" not in str(caught.value)
    finally:
        second.close()


def exchanges(rank, spaces, port, folder):
    """What a job of two hosts does at its start: its store, a secret, cards, and links; where it listens, and its rails."""
    own = ("127.0.1.1", namespaces.ADDRESSES[0])[rank]
    namespaces.enter(spaces[rank], f"127.0.0.1 localhost\n{own} node0\n", folder)
    os.environ["MASTER_ADDR"] = "node0"
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("adaptra.transport").addHandler(handler)
    logging.getLogger("adaptra.transport").setLevel(logging.INFO)
    where = "0.0.0.0" if rank == 0 else "node0"
    store = TCPStore(where, port, 2, is_master=rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False)
    topology = Topology.of(rank, [[0, 1]])
    rendezvous = Rendezvous(store, "0", rank, 30.0)
    me = PeerInfo(rank, rank, f"node{rank}")
    secret = rendezvous.secret(topology)
    mine = Endpoint(me, config(proxy="process"), secret, bind_host=rendezvous.bind_host(topology, "auto"))
    try:
        mine.connect(rendezvous.exchange(topology, me.host, mine.endpoint_info), neighbours=[1 - rank], coordinator=0)
        channel = mine.channel(1 - rank)
        channel.send((activation, gradient)[rank](0), [torch.full((3,), float(rank))])
        got = channel.recv((gradient, activation)[rank](0)).wait().tensors[0].tolist()
        assert got == [1.0 - rank] * 3
        return (
            mine.address.host,
            [line for line in lines if line.startswith("connected:")],
            set(mine.stats()["peers"][1 - rank]["rails"]),
        )
    finally:
        mine.close()


@pytest.mark.skipif(not namespaces.can_be_made(), reason="needs root, and network namespaces")
def test_two_network_namespaces_of_one_machine_and_a_master_whose_name_is_loopback(tmp_path):
    with namespaces.joined() as spaces:
        found = run_ranks(exchanges, 2, spaces, 29417, tmp_path, timeout=60)
    for rank, (host, connected, rails) in enumerate(found):
        assert host == namespaces.ADDRESSES[rank]
        assert rails == {"tcp0", "tcp1"}
        assert len(connected) == 1 and "no shm" in connected[0]
