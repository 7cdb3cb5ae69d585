"""How the ranks of a job find each other: a secret and endpoint infos, through the launcher's store.

Only rank 0 reads what all ranks publish, in one request where the store can; the others read what it makes of that, and their
neighbours' endpoint infos. So the number of reads grows with the number of ranks, not with its square.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
            made = secrets.token_bytes(SECRET_BYTES)
            self._store.set(self._key("secret"), made.hex())
            return made
        self._wait([self._key("secret")], lambda: [0])
        return bytes.fromhex(self._get(["secret"])[0])

    def bind_host(self, topology: Topology, configured: str) -> str:
        """The address that this rank listens on (if `configured`, the configuration's `transport.bind`, is a wildcard: that it
        is reached at). All ranks call it; one that would listen on loopback waits to hear where the others are.

        Raises:
            TransportError: the launcher's master address leads nowhere, or a rank did not say within the deadline where it is.
        """
        mine = Place.here(choose_bind("auto" if is_wildcard(configured) else configured, None))
        said = self._say("place", [mine.network, mine.address], topology.world_size)
        if not is_loopback(mine.address) or not (configured == "auto" or is_wildcard(configured)):
            return mine.address
        told = self._hear("place", said)
        return reachable_address(mine, [Place(*map(str, told[rank])) for rank in sorted(told)])

    def exchange(
        self, topology: Topology, host: str, endpoint_info: EndpointInfo
    ) -> dict[int, tuple[PeerInfo, EndpointInfo]]:
        """Publishes how this rank's endpoint is reached, and waits until all ranks have. Returns the same of those that it
        connects to: its neighbours and rank 0; on rank 0, of all. Call `secret` before: an endpoint info says that its rank has
        read the secret, and with all of them there, rank 0 takes the secret out of the store.

        Raises:
            TransportError: a rank did not publish its endpoint info within the deadline, has failed to start, or published nonsense.
        """
        name = "endpoint_info"
        mine = json.dumps({"host": host, "endpoint_info": endpoint_info.to_text()})
        self._store.set(self._key(f"{name}/{topology.rank}"), mine)
        if topology.rank != 0:
            # rank 0's own says that all are there
            texts = {0: self._told(name)}
            return _peers(texts | self._collect(name, [rank for rank in topology.neighbours if rank != 0]), topology)
        peers = _peers(self._collect(name, range(topology.world_size)), topology)
        with contextlib.suppress(RuntimeError):  # a store that cannot delete keeps it
            self._store.delete_key(self._key("secret"))
        self._store.set(self._key(f"{name}/all"), mine)
        return peers

    def pipelines(self, world_size: int, mine: Sequence[int]) -> list[list[int]]:
        """The world ranks of every pipeline, for hosts in which a rank knows only its own (`mine`).

        Raises:
            TransportError: a rank did not publish its pipeline within the deadline.
        """
        texts = {json.dumps(ranks) for ranks in self.gather("pipeline", list(mine), world_size).values()}
        return sorted([int(r) for r in json.loads(text)] for text in texts)

    def gather(self, name: str, value: Any, world_size: int) -> dict[int, Any]:
        """What every rank gives under a name that is used once: anything that JSON can carry. Equal values may be one object.

        Raises:
            TransportError: a rank did not give it within the deadline.
        """
        return self._hear(name, self._say(name, value, world_size))

    def _say(self, name: str, value: Any, world_size: int) -> str | None:
        """Publishes this rank's value. Rank 0 waits for all of them and publishes them as one, so that nobody else reads many;
        there it returns that."""
        self._store.set(self._key(f"{name}/{self._rank}"), json.dumps(value))
        if self._rank != 0:
            return None
        texts = list(self._collect(name, range(world_size)).values())
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        together = {"values": list(map(json.loads, distinct)), "of_rank": [distinct[text] for text in texts]}
        said = json.dumps(together)
        self._store.set(self._key(f"{name}/all"), said)
        return said

    def _hear(self, name: str, said: str | None) -> dict[int, Any]:
        """What all ranks have said, by rank; `said`: what `_say` has returned."""
        together = json.loads(self._told(name) if said is None else said)
        return {rank: together["values"][number] for rank, number in enumerate(together["of_rank"])}

    def tell_failure(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """This rank does not start: those that wait for it need not. Of several, the first one counts."""
        with contextlib.suppress(Exception):  # the store may be gone as well
            if error is not None and not self._store.check([self._key("failed")]):
                why = f"rank {self._rank} does not start: {type(error).__name__}: {error}"
                self._store.set(self._key("failed"), why[:2000])

    def _key(self, name: str) -> str:
        return f"adaptra/{self._prefix}/{name}"

    def _collect(self, name: str, ranks: Sequence[int]) -> dict[int, str]:
        """What each of the ranks has published under a name. Rank 0 says in the store, now and then, who is missing.

        Raises:
            TransportError: names who has not come within the deadline, or which rank has failed to start, and why.
        """
        missing = list(ranks)

        def look() -> list[int]:
            missing[:] = [rank for rank in missing if not self._store.check([self._key(f"{name}/{rank}")])]
            if self._rank == 0:
                self._store.set(self._key(f"{name}/missing"), json.dumps(missing))
            return missing

        self._wait([self._key(f"{name}/{rank}") for rank in ranks], look)
        return dict(zip(ranks, self._get([f"{name}/{rank}" for rank in ranks]), strict=True))

    def _told(self, name: str) -> str:
        """What rank 0 has published once all ranks had. Raises as `_collect`."""

        def look() -> list[int]:
            if not self._store.check([self._key(f"{name}/0")]):
                return [0]
            # nothing is there until rank 0 has waited for a moment
            return (
                json.loads(self._get([f"{name}/missing"])[0])
                if self._store.check([self._key(f"{name}/missing")])
                else []
            )

        self._wait([self._key(f"{name}/all")], look)
        return self._get([f"{name}/all"])[0]

    def _get(self, names: Sequence[str]) -> list[str]:
        """Values that are there; one request where the store can."""
        keys = list(map(self._key, names))
        with self._lost():
            many = len(keys) > 1 and self._store.has_extended_api()
            found = self._store.multi_get(keys) if many else [self._store.get(key) for key in keys]
        return [value.decode() for value in found]

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """What c10d stores raise for a lost server, in words."""
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(
                f"rank {self._rank} has lost the launcher's store ({error}): the process that holds it, mostly rank 0's, "
                "has ended; look at the end of its log"
            ) from None

    def _wait(self, keys: Sequence[str], missing: Callable[[], list[int]]) -> None:
        """Waits until all keys are there. Says, now and then, who is `missing` (as known now).

        Raises:
            TransportError: names who has not come within the deadline, or which rank has failed to start, and why.
        """
        # the patience of each meeting is its own: the first batch may come long after the start
        self._started = self._told_at = time.monotonic()
        self._pauses.reset()
        with self._lost():
            while keys and not self._come(keys):
                if self._store.check([self._key("failed")]):
                    raise TransportError(self._get(["failed"])[0])
                self._remind(missing())

    def _come(self, keys: Sequence[str]) -> bool:
        """Waits for keys, not long. Raises RuntimeError: the store is gone."""
        began = time.monotonic()
        limit_s = max(0.01, min(LOOK_S, self._started + self._deadline_s - began))
        try:
            self._store.wait(list(keys), timedelta(seconds=limit_s))
            return True
        except RuntimeError:
            if time.monotonic() - began < limit_s / 2:
                raise  # it does not wait at all
            return False

    def _remind(self, missing: Sequence[int]) -> None:
        now = time.monotonic()
        waited = now - self._started
        if not missing and waited < self._deadline_s:
            return  # they have just come
        missing = missing or [0]  # which does not say so
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


def _peers(texts: Mapping[int, str], topology: Topology) -> dict[int, tuple[PeerInfo, EndpointInfo]]:
    """Raises TransportError for an endpoint info that makes no sense."""
    peers = {}
    for rank, text in texts.items():
        data = json.loads(text)
        info = PeerInfo(rank=rank, pp_rank=topology.place(rank)[1], host=str(data["host"]))
        try:
            peers[rank] = (info, EndpointInfo.parse(str(data["endpoint_info"])))
        except TransportError as error:
            raise TransportError(f"{info}: {error}") from None
    return peers
