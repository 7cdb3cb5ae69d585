"""The secret is in the store only until every rank has read it; ranks that come late are waited for, and named."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore, PrefixStore, TCPStore

from adaptra_plugin.config import parse_config
from adaptra_plugin.errors import ConfigError, TransportError
from adaptra_plugin.runtime import rendezvous as module
from adaptra_plugin.runtime.rendezvous import Rendezvous, patience_s
from adaptra_plugin.runtime.session import Session
from adaptra_plugin.runtime.split import SplitLinears
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import Address, EndpointInfo

ENDPOINT_INFO = EndpointInfo((Address("127.0.0.1", 1),), 1 << 20, 1)
RANKS = 4
SECRET = "adaptra/7/secret"


def meet(*stores):
    """What each rank has of it: the secret and the table of peers. Ranks share the last of the stores."""

    def rank(number):
        topology = Topology.of(number, [list(range(RANKS))])
        rendezvous = Rendezvous(stores[min(number, len(stores) - 1)], "7", number, 20.0)
        secret = rendezvous.secret(topology)
        return secret, rendezvous.exchange(topology, f"n{number}", ENDPOINT_INFO)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(rank, range(RANKS)))


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_the_secret_is_gone_when_all_have_met(kind):
    if kind == "hash":
        stores = [HashStore()]
    else:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        others = [TCPStore("127.0.0.1", server.port) for _ in range(RANKS - 1)]
        stores = [PrefixStore("job", store) for store in (server, *others)]
    found = meet(*stores)
    store = stores[0]
    assert len({secret for secret, _ in found}) == 1 and len(found[0][0]) == 32
    # rank 0 knows all, the others those that they connect to
    known = [sorted({*peers, rank}) for rank, (_, peers) in enumerate(found)]
    assert known == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3]]
    assert store.check(["adaptra/7/endpoint_info/0"]) and not store.check([SECRET])


def test_it_stays_until_the_last_card_is_there():
    store = HashStore()

    class Watched:
        def __init__(self):
            self.deleted = 0

        def delete_key(self, key):
            assert key == SECRET and store.check([f"adaptra/7/endpoint_info/{rank}" for rank in range(RANKS)])
            self.deleted += 1
            return store.delete_key(key)

        def __getattr__(self, name):
            return getattr(store, name)

    watched = Watched()
    meet(watched)
    assert watched.deleted == 1


def test_a_store_that_cannot_delete_will_do():
    store = HashStore()

    class Old:
        def delete_key(self, key):
            raise RuntimeError("not implemented")

        def __getattr__(self, name):
            return getattr(store, name)

    assert len(meet(Old())) == RANKS and store.check([SECRET])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    monkeypatch.setattr(module, "REMIND_S", 0.1)


def tcp_stores(count):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [PrefixStore("job", s) for s in (server, *(TCPStore("127.0.0.1", server.port) for _ in range(count - 1)))]


def pipelines(store, rank, deadline_s=20.0, world=4):
    return Rendezvous(store, "7", rank, deadline_s).pipelines(world, list(range(world)))


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_who_is_late_is_named_while_the_others_wait(kind, quick, caplog):
    caplog.set_level(logging.INFO, "adaptra")
    stores = [HashStore()] * 4 if kind == "hash" else tcp_stores(4)
    with ThreadPoolExecutor(4) as pool:
        early = [pool.submit(pipelines, stores[rank], rank) for rank in (0, 2)]
        while sum("have not come yet" in line for line in caplog.messages) < 4:
            time.sleep(0.01)
            assert not any(found.done() for found in early)
        late = [pool.submit(pipelines, stores[rank], rank) for rank in (1, 3)]
        assert [found.result(20) for found in early + late] == [[[0, 1, 2, 3]]] * 4
    told = [record for record in caplog.records if "have not come yet" in record.message]
    assert "ranks 1, 3 (2) have not come yet: waiting since 0 s, at most 20 s" in told[0].message
    assert {record.levelname for record in told} == {"WARNING", "INFO"}, "one rank speaks for all"


def test_in_the_end_the_error_names_who_is_missing(quick):
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(pipelines, store, 0, 2.0)]
        while not store.check(["adaptra/7/pipeline/missing"]):  # by which the others know
            time.sleep(0.01)
        waiting.append(pool.submit(pipelines, store, 2, 0.3))
        for found, seconds in zip(waiting, (2, 0), strict=True):
            said = rf"^ranks 1, 3 \(2\) have not come within {seconds} s: .*group"
            with pytest.raises(TransportError, match=said) as caught:
                found.result(20)
    assert "connect_deadline_s" in str(caught.value)


def test_a_rank_that_does_not_start_is_named_at_once_with_its_reason(quick):
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pipelines, store, 0)
        for rank, error in ((2, ConfigError("max_activations is wrong")), (3, ValueError("later"))):
            Rendezvous(store, "7", rank, 20.0).tell_failure(type(error), error, None)
        with pytest.raises(TransportError, match=r"^rank 2 does not start: ConfigError: max_activations is wrong"):
            waiting.result(5)


def test_a_store_that_is_gone_is_not_waited_for(quick):
    class Gone:
        def __getattr__(self, name):
            def fails(*_):
                raise RuntimeError("Connection reset by peer")

            return (lambda *_: None) if name == "set" else fails

    begun = time.monotonic()
    with pytest.raises(TransportError, match=r"rank 0 has lost the launcher's store \(Connection reset by peer\)"):
        pipelines(Gone(), 0)
    assert time.monotonic() - begun < 5


def start(world):
    config = parse_config(
        {"transport": {"proxy": "thread", "bind": "127.0.0.1"}, "report": {"directory": None, "wandb": "off"}}
    )
    topology = Topology.of(0, [list(range(world))])
    return Session(config, topology, HashStore(), partial(SplitLinears, torch.nn.Linear(2, 2)), torch.device("cpu"), 2)


def test_by_default_ranks_wait_as_long_as_the_process_group_does():
    assert patience_s(7.5) == 7.5
    assert patience_s("auto") == 1800.0, "torch's own, where there is no group"
    start(1).close()  # what is compiled once takes long
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=1))
    try:
        assert patience_s("auto") == 1.0
        begun = time.monotonic()
        with pytest.raises(TransportError, match=r"^rank 1 has not come within 1 s"):
            start(2)
        assert 1.0 <= time.monotonic() - begun < 20
    finally:
        distributed.destroy_process_group()


def test_a_session_that_fails_to_start_tells_those_that_wait_for_it(monkeypatch):
    told = []
    monkeypatch.setattr(Rendezvous, "tell_failure", lambda self, kind, error, trace: told.append(error))
    monkeypatch.setattr(Rendezvous, "exchange", lambda *_: (_ for _ in ()).throw(TransportError("x")))
    with pytest.raises(TransportError):
        start(1)
    assert [str(error) for error in told] == ["x"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adaptra-control")]


def test_each_meeting_has_its_own_patience(quick):
    """The first batch may come long after the start, which is no time that a rank has been waited for."""
    first, second = (Rendezvous(store, "7", rank, 2.0) for rank, store in enumerate(tcp_stores(2)))
    first._started -= 60.0  # a minute ago
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.gather, "reasons", [], 2)
        time.sleep(0.3)
        assert not waiting.done()
        second.gather("reasons", ["late"], 2)
        assert waiting.result(20) == {0: [], 1: ["late"]}


class Counting:
    """A store that counts what one rank reads: requests, and keys."""

    def __init__(self, store):
        self._store = store
        self.requests = self.keys = 0

    def get(self, key):
        self.requests, self.keys = self.requests + 1, self.keys + 1
        return self._store.get(key)

    def multi_get(self, keys):
        self.requests, self.keys = self.requests + 1, self.keys + len(keys)
        return self._store.multi_get(keys)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_rank_reads_what_it_needs_and_rank_0_in_few_requests(monkeypatch):
    """64 ranks, 16 pipelines of 4, of a host with the master's name on loopback, which have to hear where the others are."""
    monkeypatch.setattr(module, "choose_bind", lambda how, _: "127.0.0.1")
    stages, replicas = 4, 16
    groups = [[replica + replicas * stage for stage in range(stages)] for replica in range(replicas)]
    store = HashStore()
    counting = [Counting(store) for _ in range(stages * replicas)]

    def rank(number):
        topology = Topology.of(number, groups)
        rendezvous = Rendezvous(counting[number], "7", number, 60.0)
        rendezvous.secret(topology)
        assert rendezvous.bind_host(topology, "auto") == "127.0.0.1"
        peers = rendezvous.exchange(topology, f"n{number}", ENDPOINT_INFO)
        told = rendezvous.gather("reasons", [number % 2], 64)
        assert {other: info.host for other, (info, _) in peers.items()} == {other: f"n{other}" for other in peers}
        assert told == {other: [other % 2] for other in range(64)}
        return set(peers) - {number}, {*topology.neighbours, 0} - {number}

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(rank, range(64)))
    for number, (known, needed) in enumerate(found):
        assert known == (needed if number else set(range(1, 64)))
        assert counting[number].requests <= 4 + len(needed), number
        assert number == 0 or counting[number].keys <= 4 + len(needed), number


def test_a_store_without_requests_for_several_keys_will_do():
    store = HashStore()

    class Old:
        def has_extended_api(self):
            return False

        def __getattr__(self, name):
            assert name != "multi_get"
            return getattr(store, name)

    assert [sorted(peers) for _, peers in meet(Old())] == [[0, 1, 2, 3], [0, 2], [0, 1, 3], [0, 2]]


def test_an_endpoint_info_that_makes_no_sense_is_named_and_nobody_goes_on(quick):
    store = HashStore()
    topologies = [Topology.of(rank, [[0, 1, 2]]) for rank in range(3)]
    for rank in (1, 2):
        info = ENDPOINT_INFO.to_text() if rank == 1 else "{}"
        store.set(f"adaptra/7/endpoint_info/{rank}", json.dumps({"host": f"n{rank}", "endpoint_info": info}))
    with pytest.raises(TransportError, match=r"^rank 2 \(stage 2, host n2\): it speaks protocol version"):
        Rendezvous(store, "7", 0, 5.0).exchange(topologies[0], "n0", ENDPOINT_INFO)
    with pytest.raises(TransportError, match=r"^rank 0 has not come within 0 s"):
        Rendezvous(store, "7", 1, 0.2).exchange(topologies[1], "n1", ENDPOINT_INFO)
