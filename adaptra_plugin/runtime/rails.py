"""What happens to the rails of a rank's links, in the words of the report."""

from __future__ import annotations

from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.report.event import Change
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import PeerInfo

LOST, HEALED = "paused", "healthy"


class RailWatch:
    """Turns steps of rails into events: lost when a rail is given up for a while, healed when it works again.

    Both ends of a link notice; the one of the lower stage tells.
    """

    def __init__(self, topology: Topology, host: str) -> None:
        self._topology = topology
        self._host = host
        self._lost: set[tuple[int, str]] = set()  # (rank of the peer, rail)

    def step(
        self, peer: PeerInfo, rail: str, state: str, why: str, *, iteration: int, version: int
    ) -> StragglerEvent | None:
        """An event, or None if this step is none, or the other end's to tell. Links are those of a pipeline:
        to other ranks, there are control connections, which lead nowhere else."""
        if peer.rank not in self._topology.neighbours:
            return None
        key = (peer.rank, rail)
        word: Change
        if state == LOST and key not in self._lost:
            self._lost.add(key)
            word, action = "lost", f"what was under way on it goes again over the other rails: {why}"
        elif state == HEALED and key in self._lost:
            self._lost.remove(key)
            word, action = "healed", f"it is used again: {why}"
        else:
            return None
        topology = self._topology
        if peer.pp_rank < topology.position:
            return None
        ends = [(topology.position, topology.rank, self._host), (peer.pp_rank, peer.rank, peer.host)]
        common = {"replica": topology.replica, "iteration": iteration, "plan_version": version}
        return StragglerEvent.of_rail(rail, word, ends, action=action[:500], **common)
