"""Which steps of a rail become events, and on which rank."""

from __future__ import annotations

from adaptra_plugin.runtime.rails import RailWatch
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import PeerInfo

TOPOLOGY = Topology.of(0, [[0, 2, 4], [1, 3, 5]])


def step(watch, peer, state="paused"):
    stage = TOPOLOGY.place(peer)[1]
    return watch.step(PeerInfo(peer, stage, "n"), "tcp0", state, "it is silent", iteration=3, version=1)


def test_the_earlier_stage_tells_of_a_link_that_is_lost_and_healed():
    watch = RailWatch(TOPOLOGY, "n")
    lost = step(watch, 2)
    assert (lost.state, lost.link, lost.rail, lost.since_iteration) == ("lost", "0-1", "tcp0", 3)
    assert (lost.pp_ranks, lost.ranks, lost.hosts, lost.replica) == ((0, 1), (0, 2), ("n", "n"), 0)
    assert step(watch, 2) is None, "it is lost already"
    assert step(watch, 2, "healthy").state == "healed"
    assert step(watch, 2, "healthy") is None
    assert step(RailWatch(Topology(2, TOPOLOGY.pipelines), "n"), 0) is None, "the other end tells"


def test_control_connections_are_no_links():
    for rank in range(6):
        watch = RailWatch(Topology(rank, TOPOLOGY.pipelines), "n")
        told = [peer for peer in range(6) if peer != rank and step(watch, peer) is not None]
        assert told == ([rank + 2] if rank < 4 else [])
