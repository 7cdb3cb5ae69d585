"""How the ranks of a job find each other: a secret and everybody's card, through the launcher's store."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import Card, PeerInfo

SECRET_BYTES = 32


class Rendezvous:
    """Wraps the store for one session.

    Args:
        store: a c10d store (`set`, `get`, `wait`, `delete_key`) that all ranks share; keys are put under `prefix`.
        prefix: unique to the session within the job.
        deadline_s: longest wait for another rank.
    """

    def __init__(self, store: Any, prefix: str, deadline_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._deadline = timedelta(seconds=deadline_s)

    def secret(self, topology: Topology) -> bytes:
        """The job's secret: made by rank 0, never written anywhere but the store, and there only until `exchange`."""
        if topology.rank == 0:
            self._store.set(self._key("secret"), secrets.token_hex(SECRET_BYTES))
        return bytes.fromhex(self._get("secret", "rank 0 has not started its session"))

    def exchange(self, topology: Topology, host: str, card: Card) -> dict[int, tuple[PeerInfo, Card]]:
        """Publishes how this rank's endpoint is reached and returns the same of all ranks. Call `secret` before:
        a card says that its rank has read it, and with all of them there, rank 0 takes the secret out of the store.

        Raises:
            TransportError: a rank did not publish its card within the deadline, or published nonsense.
        """
        self._store.set(self._key(f"card/{topology.rank}"), json.dumps({"host": host, "card": card.to_text()}))
        peers = {}
        for rank in range(topology.world_size):
            data = json.loads(self._get(f"card/{rank}", f"rank {rank} has not started its session"))
            info = PeerInfo(rank=rank, stage=topology.place(rank)[1], host=str(data["host"]))
            try:
                peers[rank] = (info, Card.parse(str(data["card"])))
            except TransportError as error:
                raise TransportError(f"{info}: {error}") from None
        if topology.rank == 0:
            with contextlib.suppress(RuntimeError):  # a store that cannot delete keeps it
                self._store.delete_key(self._key("secret"))
        return peers

    def pipelines(self, rank: int, world_size: int, mine: Sequence[int]) -> list[list[int]]:
        """The world ranks of every pipeline, for hosts in which a rank knows only its own (`mine`).

        Raises:
            TransportError: a rank did not publish its pipeline within the deadline.
        """
        self._store.set(self._key(f"pipeline/{rank}"), json.dumps(list(mine)))
        texts = {self._get(f"pipeline/{r}", f"rank {r} has not started its session") for r in range(world_size)}
        return sorted([int(r) for r in json.loads(text)] for text in texts)

    def _key(self, name: str) -> str:
        return f"adaptra/{self._prefix}/{name}"

    def _get(self, name: str, why: str) -> str:
        key = self._key(name)
        try:
            self._store.wait([key], self._deadline)
            return self._store.get(key).decode()
        except RuntimeError as error:  # what c10d stores raise for a timeout or a lost server
            raise TransportError(
                f"{why} within {self._deadline.total_seconds():.0f} s ({error}): is every rank started with the same "
                '"adaptra" configuration?'
            ) from None
