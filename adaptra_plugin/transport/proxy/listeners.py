"""Where a proxy is reached: its listeners, and who has proved the job's secret there."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptra_plugin.transport.bind import is_wildcard, listen
from adaptra_plugin.transport.proxy.handshake import Claim, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor
from adaptra_plugin.transport.proxy.interfaces import address_of
from adaptra_plugin.transport.proxy.rails.setup import Local
from adaptra_plugin.transport.types import Address, EndpointInfo

_BACKLOG = 512
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Listeners:
    """`on_authenticated(sock, claim, settings)` is given every connection that proves the secret."""

    def __init__(self, local: Local, on_authenticated: Callable[[socket.socket, Claim, Settings], None]) -> None:
        self._local = local
        self._on_authenticated = on_authenticated
        self._acceptors: list[Acceptor] = []

    @property
    def refused(self) -> int:
        """Connections that were no peer's."""
        return sum(acceptor.refused for acceptor in self._acceptors)

    def open(self, bind: str, reached_at: str | None, advertised: Mapping[str, Any]) -> EndpointInfo:
        """Listens. `reached_at`: shown in place of a wildcard; `advertised`: of the kinds of rails. Raises TransportError,
        OSError."""
        settings = self._local.settings
        addresses = []
        hosts = dict.fromkeys([bind, *(address_of(name) for name in settings.interfaces)])
        for host in hosts:
            sock = listen(host, _BACKLOG)
            self._add(sock)
            shown, port = sock.getsockname()[:2]  # the address of a host that was given by name
            addresses.append(Address(reached_at if is_wildcard(host) and reached_at else shown, port))
        unix = f"adaptra-{secrets.token_hex(12)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(b"\0" + unix.encode())  # abstract: nothing in the file system, gone with its last descriptor
        sock.listen(_BACKLOG)
        self._add(sock)
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        return EndpointInfo(
            addresses=tuple(addresses),
            ring_bytes=settings.ring_bytes,
            connections=settings.connections_per_direction,
            boot=boot,
            unix=unix,
            **advertised,
        )

    def _add(self, sock: socket.socket) -> None:
        local, settings = self._local, self._local.settings
        self._acceptors.append(
            Acceptor(
                local.loop,
                sock,
                local.secret,
                local.me.rank,
                Settings(settings.connections_per_direction, settings.ring_bytes),
                settings.handshake_timeout_s,
                self._on_authenticated,
                tls=None if sock.family == socket.AF_UNIX else local.tls,
            )
        )

    def refuse(self, sock: socket.socket, reason: str) -> None:
        """One who has proved the secret has no place here."""
        self._acceptors[0].refuse(sock, reason)

    def close(self) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
