"""What happens to the rails of a rank's links, in the words of the report."""

from __future__ import annotations

import time
from typing import Any

from adaptra_plugin.report import StragglerEvent
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
        self._lost_in: dict[tuple[int, str], int] = {}  # (rank of the peer, rail) -> iteration

    def step(
        self, peer: PeerInfo, rail: str, state: str, why: str, *, iteration: int, version: int
    ) -> dict[str, Any] | None:
        """The fields of an event, or None if this step is none, or the other end's to tell. Links are those of a pipeline:
        to other ranks, there are control connections, which lead nowhere else."""
        if peer.rank not in self._topology.neighbours:
            return None
        key = (peer.rank, rail)
        if state == LOST and key not in self._lost_in:
            self._lost_in[key] = since = iteration
            word, action = "lost", f"what was under way on it goes again over the other rails: {why}"
        elif state == HEALED and key in self._lost_in:
            del self._lost_in[key]
            since, word, action = iteration, "healed", f"it is used again: {why}"
        else:
            return None
        topology = self._topology
        if peer.stage < topology.position:
            return None
        return {
            "time_unix": time.time(),
            "kind": "rail",
            "state": word,
            "replica": topology.replica,
            "link": f"{topology.position}-{peer.stage}",
            "stages": [topology.position, peer.stage],
            "ranks": [topology.rank, peer.rank],
            "hosts": [self._host, peer.host],
            "since_iteration": since,
            "found_iteration": iteration,
            "delay_before_ms": 0.0,
            "delay_after_ms": 0.0,
            "action": action[:500],
            "predicted_iteration_ms_before": None,
            "predicted_iteration_ms_after": None,
            "predicted_gain": None,
            "plan_version": version,
            "rail": rail,
        }


def event_from(fields: Any) -> StragglerEvent:
    """The event behind the fields that another rank has sent.

    Raises:
        ValueError: they are not those of an event that can be reported.
    """
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        event = StragglerEvent(**values)
        event.sentence()  # what cannot be put into words has a field of another kind than it should
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"no event: {error}") from None
    return event
