"""The secret is in the store only until every rank has read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from adaptra_plugin.runtime.rendezvous import Rendezvous
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import Address, Card

CARD = Card((Address("127.0.0.1", 1),), 1 << 20, 1)
RANKS = 4
SECRET = "adaptra/7/secret"


def meet(*stores):
    """What each rank has of it: the secret and the table of peers. Ranks share the last of the stores."""

    def rank(number):
        topology = Topology.of(number, [list(range(RANKS))])
        rendezvous = Rendezvous(stores[min(number, len(stores) - 1)], "7", 20.0)
        secret = rendezvous.secret(topology)
        return secret, rendezvous.exchange(topology, f"n{number}", CARD)

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
    assert all(sorted(peers) == list(range(RANKS)) for _, peers in found)
    assert store.check(["adaptra/7/card/0"]) and not store.check([SECRET])


def test_it_stays_until_the_last_card_is_there():
    store = HashStore()

    class Watched:
        def __init__(self):
            self.deleted = 0

        def delete_key(self, key):
            assert key == SECRET and store.check([f"adaptra/7/card/{rank}" for rank in range(RANKS)])
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
