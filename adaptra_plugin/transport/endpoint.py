"""The transport of one rank: an endpoint with channels to its neighbours, served by one proxy thread."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from adaptra_plugin.config import SlowLink, TransportConfig
from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.bind import choose_bind, is_loopback, is_wildcard, listen, local_address_towards
from adaptra_plugin.transport.channel import Channel, Link
from adaptra_plugin.transport.faults import Faults
from adaptra_plugin.transport.frames import MAX_CONTROL_BACKLOG, encode_control
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.threaded import Proxy
from adaptra_plugin.transport.tickets import Fate, Loss
from adaptra_plugin.transport.types import Address, PeerInfo

MIN_SECRET_BYTES = 16
_BACKLOG = 512
_MARGIN_S = 10.0  # for the proxy to notice its own deadline

_ENDED = Loss(TransportError, "the endpoint has ended", "The reason is in the first error of this rank.")
_CLOSING = Loss(TransportError, "this endpoint is closing", "Send before `close`.")
_live: weakref.WeakSet[Endpoint] = weakref.WeakSet()


class Endpoint:
    """One per rank; create it after any fork. Listens from construction on; `connect` brings the links up."""

    address: Address
    """Where peers reach this endpoint; publish it through the launcher's store."""
    on_control: Callable[[int, dict[str, Any]], None]
    """`(rank, message)` of every control message. Called on the proxy's thread: be quick, never wait in it."""
    on_peer_lost: Callable[[PeerInfo, str], None]
    """`(peer, reason)`, once a peer, not for a goodbye. Called on the proxy's thread: be quick, never wait in it."""

    def __init__(
        self,
        me: PeerInfo,
        config: TransportConfig,
        secret: bytes,
        *,
        simulate_links: Sequence[SlowLink] = (),
        bind_host: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secret`: the same random bytes on all ranks of the job (at least 16). `bind_host`: where to listen while
        `config.bind` is "auto"; without it the address that routes to `MASTER_ADDR`. `clock`: seconds; must tick at the
        rate of real time.

        Raises:
            TransportError: the secret is too short, or the address cannot be bound.
        """
        if len(secret) < MIN_SECRET_BYTES:
            raise TransportError(
                f"the job's secret has {len(secret)} bytes: give at least {MIN_SECRET_BYTES} random ones"
            )
        self.me = me
        self.on_control = lambda rank, message: None
        self.on_peer_lost = lambda peer, reason: None
        self._config = config
        self._clock = clock
        self._fate = Fate()
        self._faults = Faults(me.stage, simulate_links)
        self._links: dict[int, Link] = {}
        self._channels: dict[int, Channel] = {}
        self._controlled: set[int] = set()
        self._connect_called = False
        self._connect_gate = threading.Event()
        self._connect_error: TransportError | None = None
        self._close_lock = threading.Lock()
        self._closed = False
        host = choose_bind(config.bind, bind_host)
        listener = listen(host, _BACKLOG)
        published = host if not is_wildcard(host) else local_address_towards(os.environ.get("MASTER_ADDR", "localhost"))
        self.address = Address(published, listener.getsockname()[1])
        source = None if config.bind == "auto" or is_wildcard(config.bind) else config.bind
        self._proxy = Proxy(me, config, secret, listener, source, clock, self)
        self._thread = threading.Thread(target=self._serve, name=f"adaptra-proxy-{me.rank}", daemon=True)
        self._thread.start()
        _live.add(self)

    # --- life

    def _serve(self) -> None:
        try:
            self._proxy.loop.run()
        except BaseException as error:  # noqa: BLE001  whatever it is, nobody may wait for a thread that has died
            log.exception("the proxy thread of rank %d failed", self.me.rank)
            failure = TransportError(
                f"the proxy thread of rank {self.me.rank} failed: {type(error).__name__}: {error}. This is a defect, "
                "or a callback (on_control, on_peer_lost) that raised; the log has the traceback"
            )
            failure.__cause__ = error
            self.fail(failure)
        finally:
            if self._fate.error is None:
                self._fate.error = TransportError(f"the endpoint of rank {self.me.rank} is closed")
            self._abort_lanes(_ENDED)
            self._proxy.close()

    def connect(
        self,
        peers: Mapping[int, tuple[PeerInfo, Address]],
        *,
        neighbours: Collection[int],
        coordinator: int,
    ) -> None:
        """Blocks until all connections with the neighbours and the control connection with the coordinator stand (the
        coordinator: with everybody), at most `connect_deadline_s`. `peers` may contain this rank itself.

        Raises:
            HandshakeError: a peer refused, with its reason (another secret, other settings).
            PeerLostError: a peer ended meanwhile.
            TransportError: names who is missing, why, and what to check.
        """
        if self._connect_called:
            raise TransportError("connect was called twice on one endpoint: create a new endpoint")
        self._connect_called = True
        others = {rank: peer for rank, peer in peers.items() if rank != self.me.rank}
        unknown = [rank for rank in (*neighbours, coordinator) if rank != self.me.rank and rank not in others]
        if unknown:
            raise TransportError(f"no address is known for ranks {sorted(set(unknown))}: publish one for every rank")
        if coordinator == self.me.rank:
            self._controlled = set(others)
        else:
            self._controlled = {coordinator}
        near = set(neighbours) - {self.me.rank}
        for rank in sorted(near):
            info = others[rank][0]
            self._links[rank] = link = Link(info, self._config, self._fate)
            self._channels[rank] = Channel(link, self._faults.towards(info.stage), self._clock)
        wanted = [(*others[rank], self._links.get(rank)) for rank in sorted(near | self._controlled)]
        self._warn_unreachable([(info, address) for info, address, _ in wanted])
        deadline_s = self._config.connect_deadline_s
        self._proxy.loop.post(lambda: self._proxy.begin_connect(wanted, coordinator, deadline_s))
        if not self._connect_gate.wait(min(deadline_s + _MARGIN_S, threading.TIMEOUT_MAX)):
            raise TransportError(
                f"the proxy thread of rank {self.me.rank} does not answer: the process is starved of CPU"
            )
        self._fate.check()
        if self._connect_error is not None:
            raise self._connect_error

    def _warn_unreachable(self, wanted: Sequence[tuple[PeerInfo, Address]]) -> None:
        for info, address in wanted:
            if info.host != self.me.host and is_loopback(address.host):
                log.warning(
                    "%s listens on %s, which only its own host reaches: set adaptra.transport.bind there", info, address
                )

    def close(self, linger_s: float = 5.0) -> None:
        """Sends what waits (at most `linger_s` seconds), says goodbye, so that peers do not take it for a loss, and
        ends the thread. Idempotent. Every later wait raises TransportError."""
        with self._close_lock:
            first, self._closed = not self._closed, True
        if first:
            for link in self._links.values():
                for lane in link.send_lanes():
                    lane.refuse(_CLOSING)
            self._proxy.loop.post(lambda: self._proxy.begin_close(linger_s))
        if threading.current_thread() is not self._thread:
            self._thread.join(linger_s + _MARGIN_S)
            if self._thread.is_alive():
                log.error("the proxy thread of rank %d does not end", self.me.rank)
        _live.discard(self)

    def fail(self, error: Exception) -> None:
        """Makes every present and future wait and send on this endpoint raise `error`; the first call counts."""
        if self._fate.error is None:
            self._fate.error = error
        self._abort_lanes(_ENDED)
        self._connect_gate.set()

    def _abort_lanes(self, loss: Loss) -> None:
        for link in list(self._links.values()):
            link.abort(loss)
        self._connect_gate.set()

    # --- use

    def channel(self, rank: int) -> Channel:
        """The channel to a neighbour; the same object each time. Raises TransportError for any other rank."""
        try:
            return self._channels[rank]
        except KeyError:
            raise TransportError(
                f"rank {rank} is no neighbour of rank {self.me.rank}: {sorted(self._channels)} are"
            ) from None

    def send_control(self, rank: int, message: dict[str, Any]) -> None:
        """Queues a JSON object for the coordinator, or from it for any rank; never blocks. Dropped if the peer is gone.

        Raises:
            TransportError: no JSON, longer than 4 MiB, no control connection with `rank`, 64 MiB wait for it already,
                or the endpoint has failed.
        """
        self._fate.check()
        if rank not in self._controlled:
            raise TransportError(
                f"rank {self.me.rank} has no control connection with rank {rank}: control messages go to and from the "
                f"coordinator only ({sorted(self._controlled)} are possible)"
            )
        waiting = self._proxy.control_backlog(rank)
        if waiting > MAX_CONTROL_BACKLOG:
            raise TransportError(
                f"{waiting} bytes of control messages wait for rank {rank}: it has stopped reading them, see its log"
            )
        data = encode_control(message)
        self._proxy.loop.post(lambda: self._proxy.send_control(rank, data))

    def set_iteration(self, iteration: int) -> None:
        """Which injected faults apply from now on to what this rank sends."""
        self._faults.iteration = iteration

    def stats(self) -> dict[str, Any]:
        """Counters since the start, per peer and direction: bytes (frames with headers), messages, ms blocked by a full
        ring, how often it was full, messages that blocked sends absorbed; per peer: offset of its clock and round trip
        (ms); and refused connections."""
        return {
            "refused_connections": self._proxy.refused,
            "peers": {rank: link.stats() for rank, link in self._links.items()},
        }

    # --- the proxy reports (on its thread)

    def connected(self) -> None:
        self._connect_gate.set()

    def connect_failed(self, error: TransportError) -> None:
        self._connect_error = error
        self._connect_gate.set()

    def lost(self, info: PeerInfo, reason: str) -> None:
        self.on_peer_lost(info, reason)

    def control(self, rank: int, message: dict[str, Any]) -> None:
        self.on_control(rank, message)

    # --- forked children (of a data loader, say)

    def abandon(self) -> None:
        """In a forked child: closes the inherited descriptors, or peers would not notice the parent's death."""
        self._closed = True
        self._fate.error = TransportError("this endpoint belongs to the parent process: create one after the fork")
        self._proxy.close()


def _abandon_all() -> None:
    for endpoint in list(_live):
        endpoint.abandon()
    _live.clear()


os.register_at_fork(after_in_child=_abandon_all)
