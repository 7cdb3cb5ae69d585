"""Which local address to listen on, so that the other ranks can reach it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import told

ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Reserved for documentation: they ask the routing table for the way out, and nothing is sent."""
_ANY_PORT = 9  # nothing is sent: connecting a datagram socket only asks the routing table
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/net")


@dataclass(frozen=True)
class Place:
    """Where a rank is in the network."""

    network: str
    """Who has the same can be reached over loopback."""
    address: str
    """The address that it would listen on if it knew nothing of others."""

    @classmethod
    def here(cls, address: str) -> Place:
        try:
            # two pods of one machine have the same boot, and each its own loopback
            return cls(f"{_BOOT_ID.read_text().strip()} {_NAMESPACE.readlink()}", address)
        except OSError:
            return cls(socket.gethostname(), address)


def local_address_towards(host: str) -> str:
    """The local address from which packets to `host` leave.

    Raises:
        TransportError: if `host` cannot be resolved or there is no route.
    """
    otherwise = "set adaptra.transport.bind to the address to listen on"
    with told(f"no local address leads to {host!r}", TransportError, otherwise):
        family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])


def reachable_address(mine: Place, others: Iterable[Place]) -> str:
    """The address to listen on: that of `mine`, or, if only its own host reaches that and not all of the `others` are there,
    the one that routes to the first of them whose address tells anything, else the one that leads out of this host.

    (Debian gives a host's own name the address 127.0.1.1, so the master's name leads its own ranks to loopback.)
    """
    if not is_loopback(mine.address):
        return mine.address
    elsewhere = [place.address for place in others if place.network != mine.network]
    if not elsewhere:
        return mine.address
    for target in (*(address for address in dict.fromkeys(elsewhere) if not is_loopback(address)), *ELSEWHERE):
        with contextlib.suppress(TransportError):
            found = local_address_towards(target)
            if not is_loopback(found):
                return found
    return mine.address


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def choose_bind(configured: str, bind_host: str | None) -> str:
    """The configured address wins, then the caller's, then the one that routes to `MASTER_ADDR`, then loopback."""
    if configured != "auto":
        return configured
    if bind_host is not None:
        return bind_host
    master = os.environ.get("MASTER_ADDR")
    return local_address_towards(master) if master else "127.0.0.1"


def listen(host: str, backlog: int) -> socket.socket:
    """A non-blocking listening socket on an ephemeral port of `host`.

    Raises:
        TransportError: if the address is not one of this host.
    """
    otherwise = "set adaptra.transport.bind to an address of this host"
    with told(f"cannot listen on {host!r}", TransportError, otherwise), ExitStack() as undo:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind(address)
        listener.listen(backlog)
        listener.setblocking(False)
        undo.pop_all()
    return listener
