"""Which local address to listen on."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import ExitStack

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import told

_ANY_PORT = 9  # nothing is sent: connecting a datagram socket only asks the routing table


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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
