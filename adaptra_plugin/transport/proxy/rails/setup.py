"""How the rails of one kind come up between this proxy and a peer. What a kind has to bring; `registry` lists the kinds."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.handshake import Claim
from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind, Sink
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.tls import Tls
from adaptra_plugin.transport.types import Direction, EndpointInfo, PeerInfo


class Local(Protocol):
    """The proxy."""

    settings: ProxySettings
    me: PeerInfo
    endpoint_info: EndpointInfo
    secret: bytes
    loop: Loop
    tls: Tls | None


class Carrier(Sink, Protocol):
    """The link that rails belong to."""

    @property
    def connections(self) -> Mapping[str, Any]: ...
    def drop_rail(self, name: str, reason: str) -> None: ...
    def make_ready(self, name: str) -> None: ...
    def send_rail_message(self, message: dict[str, Any]) -> None: ...
    def pump(self) -> None: ...


class Remote(Protocol):
    """The peer."""

    info: PeerInfo
    endpoint_info: EndpointInfo
    near: bool
    """Data go to it."""
    dials: bool
    """This side makes the connections."""
    announced: bool
    """All rails stood once: who the other end is, and what it can do, is settled."""
    skipped: dict[str, str]
    """Rails that will not come, and why."""

    @property
    def link(self) -> Carrier: ...
    @property
    def rings(self) -> Mapping[tuple[Direction, int], Memfd]:
        """What this rank fills."""

    @property
    def by_reference(self) -> bool:
        """A rail is tried that moves no bytes: no card needs to carry any."""

    @property
    def over(self) -> bool:
        """It is gone, or about to be: nothing is brought up any more."""

    def adopt(self, sock: socket.socket, claim: Claim) -> str | None:
        """A connection that has passed its handshake: takes it over, or says why it has no place here."""

    def stands(self, rail: Rail, *, ready: bool = True) -> None:
        """A rail has come up. `ready`: data may go over it."""

    def check_up(self) -> None:
        """Looks whether all rails stand by now; whoever connects hears of it once."""

    def skip(self, name: str, why: str) -> None:
        """A rail is given up for good; the link does without it."""

    def later(self, name: str) -> None:
        """This end's attempt to bring a rail up, or back, has failed: it is tried again after a pause that grows."""

    def refused(self, why: str) -> None:
        """The other end refuses this one."""

    def not_listening(self) -> None:
        """A connection was refused by its host."""

    @property
    def may_be_direct(self) -> bool:
        """Nothing but this host's memory is to be between the two endpoints."""

    def memfds(self, rings: list[int], direct: int | None) -> None:
        """The peer's rings have come, and this endpoint's end of a pair of sockets to the peer's."""


class RailSetup(ABC):
    """The rails of one kind to one peer, of which some may stand."""

    kind: RailKind
    by_reference = False
    names: tuple[str, ...] = ()
    """Those that are tried; the same at both ends."""

    def __init__(self, local: Local, peer: Remote) -> None:
        self._local, self._peer, self._loop = local, peer, local.loop

    def _rule_out(self, why: str) -> None:
        """None of this kind is tried."""
        self.names = ()
        self._peer.skipped[self.kind.word] = why

    @property
    def needs_carrier(self) -> bool:
        """Nothing can be tried before another rail stands."""
        return False

    @property
    def complete(self) -> bool:
        """Whether those that stand are all that they will be."""
        return True

    @property
    def direct(self) -> bool:
        """The two endpoints can tell each other of messages."""
        return False

    @abstractmethod
    def dial(self, name: str) -> None:
        """Tries to bring a rail up."""

    def dialling(self, name: str) -> bool:
        return False

    def why_missing(self, name: str) -> str:
        """What was in the way last; empty: nothing is known."""
        return ""

    def taken(self, sock: socket.socket, claim: Claim) -> None:
        """A connection for one of them has passed its handshake; it is this object's now."""
        sock.close()

    def mapped(self, refusal: str | None) -> None:  # noqa: B027  most kinds map nothing
        """The endpoint has mapped the peer's rings, or cannot, for the reason given."""

    def message(self, message: dict[str, Any]) -> None:  # noqa: B027  nor talk about it
        """The other proxy speaks of rails, maybe of these."""

    def lost(self, name: str) -> None:  # noqa: B027
        """One of them has failed."""

    def close(self) -> None:  # noqa: B027
        """No more attempts. Idempotent."""


class RailFactory(ABC):
    """One kind of rails, for all peers of a proxy."""

    def find(self, loop: Loop, settings: ProxySettings) -> None:  # noqa: B027
        """Opens what the machine has and the configuration wants. Never raises."""

    def advertised(self) -> dict[str, Any]:
        """Fields of `EndpointInfo`."""
        return {}

    @abstractmethod
    def setup(self, local: Local, peer: Remote) -> RailSetup: ...

    def abandon(self) -> None:  # noqa: B027
        """In a forked child: what is open belongs to the parent."""

    def close(self) -> None:  # noqa: B027
        """After all rails."""
