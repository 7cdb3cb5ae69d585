"""The proxy: everything that runs on the loop's thread. It knows sockets and books, never tensors.

An endpoint talks to it through `Loop.post` and the lanes only, and is told through `Events`, so that the proxy can move
to a process of its own, with rings in shared memory, without a change for the users of the endpoint.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.errors import HandshakeError, PeerLostError, TransportError
from adaptra_plugin.transport.channel import Link
from adaptra_plugin.transport.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.loop import Loop, Timer
from adaptra_plugin.transport.meeting import Dialer, Listener
from adaptra_plugin.transport.peers import Peer
from adaptra_plugin.transport.tickets import Loss
from adaptra_plugin.transport.types import Address, PeerInfo

FAREWELL_S = 1.0
"""How long a closing endpoint that has sent everything waits for its peers to close as well."""


class Events(Protocol):
    """What the endpoint hears; called on the proxy's thread."""

    def connected(self) -> None: ...
    def connect_failed(self, error: TransportError) -> None: ...
    def lost(self, info: PeerInfo, reason: str) -> None: ...
    def control(self, rank: int, message: dict[str, Any]) -> None: ...


class Proxy:
    """Listens at once; connects when told the peers; serves until closed."""

    def __init__(
        self,
        me: PeerInfo,
        config: TransportConfig,
        secret: bytes,
        listener: socket.socket,
        source: str | None,
        clock: Callable[[], float],
        events: Events,
    ) -> None:
        self.loop = Loop(clock)
        self.settings = Settings(config.connections_per_direction, config.ring_mib << 20)
        self._me = me
        self._config = config
        self._secret = secret
        self._source = source
        self._events = events
        self._peers: dict[int, Peer] | None = None
        self._early: list[tuple[socket.socket, Claim, Settings]] = []  # came before `begin_connect`
        self._dialers: dict[tuple[int, Purpose, int], Dialer] = {}
        self._connecting: Timer | None = None
        self._closing: Timer | None = None
        self._farewell: Timer | None = None
        self._listener = Listener(
            self.loop, listener, secret, me.rank, self.settings, config.handshake_timeout_s, self._authenticated
        )

    @property
    def refused(self) -> int:
        return self._listener.refused

    # --- connecting

    def begin_connect(
        self, wanted: Sequence[tuple[PeerInfo, Address, Link | None]], coordinator: int, deadline_s: float
    ) -> None:
        """Dials, or waits for, every wanted peer. Of two, the coordinator is dialled, else the higher rank."""
        self._peers = {info.rank: Peer(info, address, link, self.loop, self) for info, address, link in wanted}
        self._connecting = self.loop.call_later(deadline_s, lambda: self._give_up(deadline_s))
        for peer in self._peers.values():
            rank = peer.info.rank
            dials = self._me.rank != coordinator and (rank == coordinator or self._me.rank < rank)
            for purpose, index in sorted(peer.missing) if dials else ():
                claim = Claim(self._me.rank, self._me.stage, rank, purpose, index)
                self._dialers[rank, purpose, index] = Dialer(
                    self.loop,
                    peer.address,
                    claim,
                    self._secret,
                    self.settings,
                    self._config.handshake_timeout_s,
                    self._source,
                    self._dialled,
                    self._turned_away,
                )
        early, self._early = self._early, []
        for arrival in early:
            self._authenticated(*arrival)
        self._check_connected()

    def _authenticated(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        if self._peers is None:
            self._early.append((sock, claim, settings))
            return
        peer = self._peers.get(claim.source)
        if peer is None:
            reason: str | None = f"rank {claim.source} is no neighbour of rank {self._me.rank}"
        elif peer.info.stage != claim.stage:
            reason = f"rank {claim.source} says it is stage {claim.stage}, here it is known as {peer.info}"
        else:
            reason = peer.adopt(sock, claim, settings)
        if reason is not None:
            self._listener.refuse(sock, reason)

    def _dialled(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        del self._dialers[claim.target, claim.purpose, claim.index]
        assert self._peers is not None
        reason = self._peers[claim.target].adopt(sock, claim, settings)
        if reason is not None:
            log.warning("dropped: connection to rank %d: %s", claim.target, reason)
            sock.close()

    def _turned_away(self, claim: Claim, error: HandshakeError) -> None:
        assert self._peers is not None
        peer = self._peers[claim.target]
        self._connect_failed(HandshakeError(f"{peer.info} at {peer.address} refused the connection: {error}"))

    def _give_up(self, deadline_s: float) -> None:
        lines = []
        for peer in (self._peers or {}).values():
            if peer.up:
                continue
            reasons = {d.last_reason for key, d in self._dialers.items() if key[0] == peer.info.rank}
            how = (
                "; ".join(sorted(reasons))
                if reasons
                else "it has not dialled this rank"
                if peer.missing
                else "no pings"
            )
            lines.append(f"{peer.info} at {peer.address} ({len(peer.missing)} connections missing: {how})")
        self._connect_failed(
            TransportError(
                f"rank {self._me.rank} is not connected after {deadline_s:g} s; missing: {', '.join(lines)}. Check "
                "that they run and that a firewall lets them through, or raise adaptra.transport.connect_deadline_s"
            )
        )

    def _connect_failed(self, error: TransportError) -> None:
        if self._connecting is not None:
            self._end_connecting()
            self._events.connect_failed(error)

    def _end_connecting(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        for dialer in self._dialers.values():
            dialer.close()
        self._dialers.clear()

    def _check_connected(self) -> None:
        if self._connecting is not None and all(peer.up for peer in self._each_peer()):
            self._end_connecting()
            self._events.connected()

    def _each_peer(self) -> Collection[Peer]:
        return (self._peers or {}).values()

    # --- what peers report

    def peer_up(self, peer: Peer) -> None:
        self._check_connected()

    def peer_gone(self, peer: Peer, loss: Loss, expected: bool) -> None:
        if self._connecting is not None:
            self._connect_failed(PeerLostError(f"{peer.info} was lost while connecting: {loss.reason}. {loss.remedy}"))
        if not expected:
            self._events.lost(peer.info, loss.reason)

    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None:
        self._events.control(peer.info.rank, message)

    def peer_closed(self, peer: Peer) -> None:
        self._check_closed()

    # --- commands

    def control_backlog(self, rank: int) -> int:
        """Bytes of control messages that wait for `rank`; any thread may ask."""
        peer = (self._peers or {}).get(rank)
        return peer.control_backlog if peer is not None else 0

    def send_control(self, rank: int, data: bytes) -> None:
        peer = (self._peers or {}).get(rank)
        if peer is not None:
            peer.send_control(data)

    def begin_close(self, linger_s: float) -> None:
        """Sends what waits and goodbye to all, then stops the loop; after `linger_s` in any case."""
        if self._closing is not None:
            return
        self._end_connecting()
        self._closing = self.loop.call_later(linger_s, self._out_of_patience)
        for peer in self._each_peer():
            peer.begin_close()
        self._check_closed()

    def _check_closed(self) -> None:
        if self._closing is None:
            return
        left = [stream for peer in self._each_peer() for stream in peer.streams if not stream.closed]
        if not left:
            self.loop.stop()
        elif self._farewell is None and all(stream.finished_writing for stream in left):
            self._farewell = self.loop.call_later(FAREWELL_S, self.loop.stop)

    def _out_of_patience(self) -> None:
        for peer in self._each_peer():
            unsent = sum(stream.unsent for stream in peer.streams if not stream.closed)
            if unsent:
                log.warning("closed with %d bytes unsent to %s", unsent, peer.info)
        self.loop.stop()

    def close(self) -> None:
        """Gives back every descriptor; only after the loop has ended, or in a forked child that never runs it."""
        self.loop.close()  # first: a child must not unregister sockets from the selector it shares with its parent
        for dialer in self._dialers.values():
            dialer.close()
        for sock, _, _ in self._early:
            sock.close()
        for peer in self._each_peer():
            peer.close()
        self._listener.close()
