"""Rails over connected stream sockets, of both kinds: TCP between any two ranks, Unix sockets within a host."""

from __future__ import annotations

import functools
import socket
from typing import Any

from adaptra_plugin.errors import HandshakeError
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Connector
from adaptra_plugin.transport.proxy.rails.base import RailKind
from adaptra_plugin.transport.proxy.rails.exchange import RingExchange
from adaptra_plugin.transport.proxy.rails.setup import Local, RailFactory, RailSetup, Remote
from adaptra_plugin.transport.proxy.rails.stream import StreamRail
from adaptra_plugin.transport.proxy.tls import Tls
from adaptra_plugin.transport.types import Address

_UNANSWERED_MS = 60_000
"""The kernel ends a TCP connection whose other host acknowledges nothing for so long; a busy process does not matter."""


class _Sockets(RailSetup):
    """Dials, and hears what became of it."""

    purpose: Purpose

    def __init__(self, local: Local, peer: Remote) -> None:
        super().__init__(local, peer)
        self._connectors: dict[str, Connector] = {}

    def dialling(self, name: str) -> bool:
        return name in self._connectors

    def why_missing(self, name: str) -> str:
        return self._connectors[name].last_reason if name in self._connectors else ""

    def _connect(self, name: str, index: int, address: Address | str, source: str | None, tls: Tls | None) -> None:
        local, settings = self._local, self._local.settings
        self._connectors[name] = Connector(
            self._loop,
            address,
            Claim(local.me.rank, local.me.pp_rank, self._peer.info.rank, self.purpose, index),
            local.secret,
            Settings(settings.connections_per_direction, settings.ring_bytes),
            settings.handshake_timeout_s,
            source,
            self._dialled,
            self._turned_away,
            self._dial_failed,
            tls=tls,
        )

    def _dialled(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        self._connectors.pop(claim.rail, None)
        reason = self._peer.adopt(sock, claim)
        if reason is not None:
            log.warning("dropped: connection %s to rank %d: %s", claim.rail, self._peer.info.rank, reason)
            sock.close()

    def _turned_away(self, claim: Claim, error: HandshakeError) -> None:
        self._connectors.pop(claim.rail, None)
        if self._peer.announced:
            # who they are was settled at the start: something was in the way, or damaged
            log.warning("rail %s to %s did not come back: %s", claim.rail, self._peer.info, error)
            self._peer.later(claim.rail)
        else:
            self._refused(claim, error)

    def _refused(self, claim: Claim, error: HandshakeError) -> None:
        """The first connection is."""
        self._peer.refused(f"refused the connection: {error}")

    def _dial_failed(self, claim: Claim, error: Exception) -> None:
        """An attempt, and there will be others."""

    def close(self) -> None:
        for connector in self._connectors.values():
            connector.close()
        self._connectors.clear()


class TcpRails(_Sockets):
    """One rail per lane and pair of interfaces; one to a peer that only gets control messages."""

    kind, purpose = RailKind.TCP, Purpose.TCP

    def __init__(self, local: Local, peer: Remote) -> None:
        super().__init__(local, peer)
        here, there = local.endpoint_info.addresses, peer.endpoint_info.addresses
        self._paths = min(len(here), len(there)) if peer.near else 1
        count = local.settings.connections_per_direction * self._paths if peer.near else 1
        self.names = tuple(f"{self.kind.word}{index}" for index in range(count))

    def dial(self, name: str) -> None:
        index = self.names.index(name)
        path = index % self._paths
        source = self._local.endpoint_info.addresses[path].host if path else None
        self._connect(name, index, self._peer.endpoint_info.addresses[path], source, self._local.tls)

    def _dial_failed(self, claim: Claim, error: Exception) -> None:
        if isinstance(error.__cause__ or error, ConnectionRefusedError):
            self._peer.not_listening()

    def taken(self, sock: socket.socket, claim: Claim) -> None:
        # a host that answers to nothing, on what may be the last rail, which is never closed for being silent
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
        self._peer.stands(StreamRail(self.kind, claim.rail, self._peer.link, self._loop, sock))


class ShmRails(_Sockets):
    """One rail by reference, over a Unix socket: both ends map each other's rings first."""

    kind, purpose, by_reference = RailKind.SHM, Purpose.SHM, True

    def __init__(self, local: Local, peer: Remote) -> None:
        super().__init__(local, peer)
        self._exchange: RingExchange | None = None
        self._mapped_here = self._mapped_there = False
        self._paired = False  # both endpoints are given a pair of sockets
        self._name = self.kind.word
        if not (peer.near and local.settings.wants(self.kind.word)):
            return
        self.names = (self._name,)
        if local.endpoint_info.boot != peer.endpoint_info.boot:
            self._rule_out("it runs on another host")
        elif not (local.endpoint_info.unix and peer.endpoint_info.unix):
            self._rule_out("one end does not offer it")

    @property
    def complete(self) -> bool:
        return self._mapped_here

    @property
    def direct(self) -> bool:
        return self._paired and self._mapped_here and self._mapped_there

    def dial(self, name: str) -> None:
        if name not in self._peer.skipped:
            self._connect(name, 0, self._peer.endpoint_info.unix, None, None)

    def _refused(self, claim: Claim, error: HandshakeError) -> None:
        self._peer.skip(claim.rail, f"it refused: {error}")

    def _dial_failed(self, claim: Claim, error: Exception) -> None:
        if not self._peer.announced:
            self._connectors.pop(claim.rail).close()
            why = f"its socket cannot be reached from here ({error}): is it in another network namespace?"
            self._peer.skip(claim.rail, why)

    def taken(self, sock: socket.socket, claim: Claim) -> None:
        if self._exchange is not None:
            self._exchange.close()
        rings = [ring.fd for ring in self._peer.rings.values()]
        timeout_s = self._local.settings.handshake_timeout_s
        self._exchange = RingExchange(
            *(self._loop, sock, rings, self._rings_came, self._no_rings, timeout_s),
            # later the endpoint has its way of telling, which it keeps
            direct=not self._peer.announced and self._peer.may_be_direct,
            pairs=self._peer.dials,
        )

    def _rings_came(self, sock: socket.socket, rings: list[int], direct: int | None) -> None:
        self._exchange = None
        self._mapped_here = False
        self._paired = direct is not None
        self._peer.memfds(rings, direct)
        # the peer may have said that it has mapped this rank's rings before theirs came
        rail = StreamRail(self.kind, self._name, self._peer.link, self._loop, sock)
        self._peer.stands(rail, ready=self._mapped_there)

    def _no_rings(self, reason: str) -> None:
        self._exchange = None
        if self._peer.dials and self._peer.announced:
            log.warning("rail %s to %s did not come back: %s", self._name, self._peer.info, reason)
            self._peer.later(self._name)
        elif self._peer.dials:
            self._peer.skip(self._name, reason)

    def mapped(self, refusal: str | None) -> None:
        if refusal is not None:  # the link does without
            self._peer.skip(self._name, refusal)
            self._peer.link.drop_rail(self._name, refusal)
            return
        self._mapped_here = True
        self._peer.link.send_rail_message({"mapped": self._name})
        self._peer.link.pump()
        self._peer.check_up()

    def message(self, message: dict[str, Any]) -> None:
        if message.get("mapped") == self._name:
            self._mapped_there = True
            self._peer.link.make_ready(self._name)
            self._peer.check_up()

    def lost(self, name: str) -> None:
        self._mapped_there = False

    def close(self) -> None:
        super().close()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None


class SocketFactory(RailFactory):
    """Needs nothing that the proxy does not have."""

    def __init__(self, make: type[_Sockets]) -> None:
        self._make = make

    def setup(self, local: Local, peer: Remote) -> RailSetup:
        return self._make(local, peer)


TcpFactory = functools.partial(SocketFactory, TcpRails)
ShmFactory = functools.partial(SocketFactory, ShmRails)
