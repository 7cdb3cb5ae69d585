"""How the ranks of a job find each other: a secret and everybody's endpoint info, through the launcher's store."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

from torch.distributed import distributed_c10d as c10d

from adaptra_plugin.backoff import Backoff
from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import EndpointInfo, PeerInfo
from adaptra_plugin.transport.bind import Place, choose_bind, is_loopback, is_wildcard, reachable_address

logger = logging.getLogger("adaptra")
SECRET_BYTES = 32
LOOK_S = 1.0
"""A wait is interrupted as often, to hear whether a rank has failed."""
REMIND_S = 10.0
"""Until it is said who is missing; again after pauses that double, up to ten minutes."""
_LONGEST_PAUSE_S = 600.0
_MAX_NAMED = 16


def patience_s(configured: float | Literal["auto"]) -> float:
    """How long to wait for ranks that come late: as configured, or as long as the default process group would."""
    if configured != "auto":
        return configured
    found = []
    with contextlib.suppress(Exception):  # there may be none, and its insides are torch's own
        group = c10d._get_default_group()
        for device in group._device_types:
            with contextlib.suppress(Exception):
                found.append(group._get_backend(device).options._timeout.total_seconds())
    return max(found, default=c10d.default_pg_timeout.total_seconds())


class Rendezvous:
    """Wraps the store for one session.

    Args:
        store: a c10d store (`set`, `get`, `wait`, `check`, `delete_key`) that all ranks share; keys are put under `prefix`.
        prefix: unique to the session within the job.
        rank: of this process.
        deadline_s: longest wait for other ranks.
    """

    def __init__(self, store: Any, prefix: str, rank: int, deadline_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._deadline_s = deadline_s
        self._started = time.monotonic()
        self._pauses = Backoff(REMIND_S, _LONGEST_PAUSE_S)
        self._told_at = self._started

    def secret(self, topology: Topology) -> bytes:
        """The job's secret: made by rank 0, never written anywhere but the store, and there only until `exchange`."""
        if topology.rank == 0:
            self._store.set(self._key("secret"), secrets.token_hex(SECRET_BYTES))
        return bytes.fromhex(self._collect(lambda rank: "secret", [0])[0])

    def bind_host(self, topology: Topology, configured: str) -> str:
        """The address that this rank listens on (if `configured`, the configuration's `transport.bind`, is a wildcard: that it
        is reached at). All ranks call it; one that would listen on loopback waits to hear where the others are.

        Raises:
            TransportError: the launcher's master address leads nowhere, or a rank did not say within the deadline where it is.
        """
        mine = Place.here(choose_bind("auto" if is_wildcard(configured) else configured, None))
        self._store.set(self._key(f"place/{topology.rank}"), json.dumps([mine.network, mine.address]))
        if not is_loopback(mine.address) or not (configured == "auto" or is_wildcard(configured)):
            return mine.address
        texts = self._collect(lambda rank: f"place/{rank}", range(topology.world_size)).values()
        return reachable_address(mine, [Place(*map(str, json.loads(text))) for text in texts])

    def exchange(
        self, topology: Topology, host: str, endpoint_info: EndpointInfo
    ) -> dict[int, tuple[PeerInfo, EndpointInfo]]:
        """Publishes how this rank's endpoint is reached and returns the same of all ranks. Call `secret` before:
        an endpoint info says that its rank has read the secret, and with all of them there, rank 0 takes the secret out of the store.

        Raises:
            TransportError: a rank did not publish its endpoint info within the deadline, has failed to start, or published nonsense.
        """
        self._store.set(
            self._key(f"endpoint_info/{topology.rank}"),
            json.dumps({"host": host, "endpoint_info": endpoint_info.to_text()}),
        )
        peers = {}
        for rank, text in self._collect(lambda rank: f"endpoint_info/{rank}", range(topology.world_size)).items():
            data = json.loads(text)
            info = PeerInfo(rank=rank, pp_rank=topology.place(rank)[1], host=str(data["host"]))
            try:
                peers[rank] = (info, EndpointInfo.parse(str(data["endpoint_info"])))
            except TransportError as error:
                raise TransportError(f"{info}: {error}") from None
        if topology.rank == 0:
            with contextlib.suppress(RuntimeError):  # a store that cannot delete keeps it
                self._store.delete_key(self._key("secret"))
        return peers

    def pipelines(self, world_size: int, mine: Sequence[int]) -> list[list[int]]:
        """The world ranks of every pipeline, for hosts in which a rank knows only its own (`mine`).

        Raises:
            TransportError: a rank did not publish its pipeline within the deadline.
        """
        texts = {json.dumps(ranks) for ranks in self.gather("pipeline", list(mine), world_size).values()}
        return sorted([int(r) for r in json.loads(text)] for text in texts)

    def gather(self, name: str, value: Any, world_size: int) -> dict[int, Any]:
        """What every rank gives under a name that is used once: anything that JSON can carry.

        Raises:
            TransportError: a rank did not give it within the deadline.
        """
        self._store.set(self._key(f"{name}/{self._rank}"), json.dumps(value))
        found = self._collect(lambda rank: f"{name}/{rank}", range(world_size))
        return {rank: json.loads(text) for rank, text in found.items()}

    def tell_failure(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """This rank does not start: those that wait for it need not. Of several, the first one counts."""
        with contextlib.suppress(Exception):  # the store may be gone as well
            if error is not None and not self._store.check([self._key("failed")]):
                why = f"rank {self._rank} does not start: {type(error).__name__}: {error}"
                self._store.set(self._key("failed"), why[:2000])

    def _key(self, name: str) -> str:
        return f"adaptra/{self._prefix}/{name}"

    def _collect(self, name: Callable[[int], str], ranks: Sequence[int]) -> dict[int, str]:
        """What each of the ranks has published under `name(rank)`. Says, now and then, who is missing.

        Raises:
            TransportError: names who has not come within the deadline, or which rank has failed to start, and why.
        """
        found: dict[int, str] = {}
        # the patience of each meeting is its own: the first batch may come long after the start
        self._started = self._told_at = time.monotonic()
        self._pauses.reset()
        for rank in ranks:
            key = self._key(name(rank))
            try:
                while not self._comes(key):
                    if self._store.check([self._key("failed")]):
                        raise TransportError(self._store.get(self._key("failed")).decode(errors="replace"))
                    self._remind([r for r in ranks if r not in found and not self._store.check([self._key(name(r))])])
                found[rank] = self._store.get(key).decode()
            except TransportError:
                raise
            except RuntimeError as error:  # what c10d stores raise for a lost server
                raise TransportError(
                    f"rank {self._rank} has lost the launcher's store ({error}): the process that holds it, mostly rank 0's, "
                    "has ended; look at the end of its log"
                ) from None
        return found

    def _comes(self, key: str) -> bool:
        """Waits for a key, not long. Raises RuntimeError: the store is gone."""
        began = time.monotonic()
        limit_s = max(0.01, min(LOOK_S, self._started + self._deadline_s - began))
        try:
            self._store.wait([key], timedelta(seconds=limit_s))
            return True
        except RuntimeError:
            if time.monotonic() - began < limit_s / 2:
                raise  # it does not wait at all
            return False

    def _remind(self, missing: Sequence[int]) -> None:
        if not missing:
            return  # they have just come
        now = time.monotonic()
        waited = now - self._started
        named = ", ".join(map(str, missing[:_MAX_NAMED])) + (", ..." if len(missing) > _MAX_NAMED else "")
        who = f"rank {named} has" if len(missing) == 1 else f"ranks {named} ({len(missing)}) have"
        if waited >= self._deadline_s:
            raise TransportError(
                f"{who} not come within {waited:.0f} s: look at the end of their logs. Ranks that load for longer need a higher "
                "timeout of the process group or adaptra.transport.connect_deadline_s, and all of them the "
                '"adaptra" configuration'
            )
        if now - self._told_at >= self._pauses.pause_s:
            self._told_at = now
            self._pauses.next()
            # one rank speaks for all
            level = logging.WARNING if self._rank == (1 if 0 in missing else 0) else logging.INFO
            logger.log(level, "%s not come yet: waiting since %.0f s, at most %.0f s", who, waited, self._deadline_s)
