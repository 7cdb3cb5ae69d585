"""Two doctors meet: the secret, and an authenticated exchange of JSON objects between their hosts.

The connection proves the secret with the transport's own handshake (`transport.proxy.handshake`) before any other byte is
read. Then each message is a length (4 bytes) and a JSON object; as on the transport's own connections, what follows the
handshake is neither encrypted nor authenticated again, and no secret is in it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.errors import ConfigError, HandshakeError, PeerLostError, TransportError
from adaptra_plugin.transport import Address
from adaptra_plugin.transport.bind import (
    ELSEWHERE,
    choose_bind,
    is_loopback,
    is_wildcard,
    listen,
    local_address_towards,
)
from adaptra_plugin.transport.endpoint import MIN_SECRET_BYTES
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor, Connector
from adaptra_plugin.transport.proxy.loop import Loop

VARIABLE = "ADAPTRA_SECRET"
SERVER, CLIENT = 0, 1
"""Ranks of the two ends."""
MAX_MESSAGE_BYTES = 1 << 20
_BACKLOG = 16
_LENGTH = struct.Struct("<I")


def known_secret() -> bytes | None:
    """The secret that the environment has, if any. Raises ConfigError if it is too short."""
    text = os.environ.get(VARIABLE)
    return _checked(text, VARIABLE) if text else None


def ask_secret() -> bytes:
    """From the environment, or asked for without echo on a terminal, or the first line of stdin.

    Raises:
        ConfigError: it is missing or too short.
    """
    found = known_secret()
    if found is not None:
        return found
    if sys.stdin.isatty():
        return _checked(getpass.getpass("secret that `adaptra doctor --serve` has printed: "), "the secret")
    return _checked(sys.stdin.readline(), f"the first line of stdin ({VARIABLE} is not set)")


def new_secret() -> str:
    return secrets.token_hex(MIN_SECRET_BYTES)


def _checked(text: str, what: str) -> bytes:
    secret = text.strip().encode()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{what} has {len(secret)} bytes: expected the secret that `adaptra doctor --serve` has printed, or "
            f"{MIN_SECRET_BYTES} bytes or more of your own on both hosts"
        )
    return secret


class Gone(PeerLostError):
    """The other doctor has ended, or is silent: nothing more can be measured."""


class Wire:
    """Objects to and from the other doctor."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        sock.settimeout(deadline_s)
        self._sock = sock
        self._deadline_s = deadline_s

    @property
    def local_host(self) -> str:
        """The address of this host that the other one talks with."""
        return str(self._sock.getsockname()[0])

    def send(self, message: dict[str, Any]) -> None:
        """Raises Gone."""
        data = json.dumps(message).encode()
        try:
            self._sock.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Gone(f"the other doctor is gone ({error.strerror or error}): look at its output") from None

    def receive(self) -> dict[str, Any]:
        """The next object; waits for all of it for `deadline_s` at most. Raises Gone, TransportError."""
        until = time.monotonic() + self._deadline_s
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, until))
        if length > MAX_MESSAGE_BYTES:
            raise TransportError(f"the other doctor announces a message of {length} bytes: install the same release")
        try:
            message = json.loads(self._exactly(length, until))
        except (ValueError, RecursionError) as error:
            raise TransportError(
                f"what the other doctor sent is not JSON ({error}): install the same release"
            ) from None
        if not isinstance(message, dict):
            raise TransportError(f"the other doctor sent a {type(message).__name__}: install the same release")
        return message

    def _exactly(self, nbytes: int, until: float) -> bytes:
        data = bytearray()
        try:
            while len(data) < nbytes:
                self._sock.settimeout(max(0.001, until - time.monotonic()))
                part = self._sock.recv(nbytes - len(data))
                if not part:
                    raise Gone("the other doctor is gone: look at its output")
                data += part
        except TimeoutError:
            raise Gone(f"the other doctor has said nothing for {self._deadline_s:g} s") from None
        except OSError as error:
            raise Gone(f"the other doctor is gone ({error.strerror or error}): look at its output") from None
        finally:
            self._sock.settimeout(self._deadline_s)
        return bytes(data)

    def close(self) -> None:
        self._sock.close()


def _settings(config: TransportConfig) -> Settings:
    return Settings(config.connections_per_direction, config.ring_bytes)


def serve(
    config: TransportConfig,
    bind: str | None,
    secret: bytes,
    ready: Callable[[Address], None],
    *,
    wait_s: float,
    deadline_s: float,
) -> Wire:
    """Waits for the other doctor (at most `wait_s` seconds), refuses strangers. `ready` hears where it listens.

    Raises:
        TransportError: the address is not one of this host, or nobody came.
    """
    host = bind or _own_address(config)
    loop, found = Loop(), list[socket.socket]()
    acceptor: Acceptor | None = None

    def arrived(sock: socket.socket, claim: Claim, settings: Settings) -> None:
        if found:
            sock.close()
            return
        found.append(sock)
        loop.stop()

    try:
        sock = listen(host, _BACKLOG)
        acceptor = Acceptor(loop, sock, secret, SERVER, _settings(config), config.handshake_timeout_s, arrived)
        port = sock.getsockname()[1]
        ready(Address(_own_address(config) if is_wildcard(host) else host, port))
        loop.call_later(wait_s, loop.stop)
        loop.run()
    except BaseException:
        for sock in found:
            sock.close()
        raise
    finally:
        if acceptor is not None:
            acceptor.close()
        loop.close()
    if not found:
        raise TransportError(f"nobody has come with the secret within {wait_s:g} s: look at the other host's output")
    return Wire(found[0], deadline_s)


def _own_address(config: TransportConfig) -> str:
    if not is_wildcard(config.bind) and (config.bind != "auto" or "MASTER_ADDR" in os.environ):
        found = choose_bind(config.bind, None)
        if config.bind != "auto" or not is_loopback(found):
            return found  # else the master's name is this host's, and its own address for that says nothing
    for target in ELSEWHERE:
        with contextlib.suppress(TransportError):
            return local_address_towards(target)
    return "127.0.0.1"  # a host without a way out can still be examined against itself


def dial(config: TransportConfig, address: Address, secret: bytes, *, deadline_s: float) -> Wire:
    """Goes to the other doctor; tries again until it listens (at most `connect_deadline_s` seconds).

    Raises:
        HandshakeError: it refused, or does not know the secret.
        TransportError: nothing answers there.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(
            f"{address}: {error.strerror or error}: give the address that --serve has printed"
        ) from None
    loop, socks, refusals = Loop(), list[socket.socket](), list[HandshakeError]()

    def arrived(sock: socket.socket, claim: Claim, settings: Settings) -> None:
        socks.append(sock)
        loop.stop()

    def refused(claim: Claim, error: HandshakeError) -> None:
        refusals.append(error)
        loop.stop()

    connector: Connector | None = None
    try:
        connector = Connector(
            loop,
            Address(str(found[0][4][0]), address.port),
            Claim(CLIENT, CLIENT, SERVER, Purpose.TCP, 0),
            secret,
            _settings(config),
            config.handshake_timeout_s,
            None,
            arrived,
            refused,
        )
        loop.call_later(config.connect_s, loop.stop)
        loop.run()
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    finally:
        if connector is not None:
            connector.close()
        loop.close()
    if refusals:
        raise HandshakeError(f"{address} refused: {refusals[0]}")
    if not socks:
        raise TransportError(
            f"{address} has not answered within {config.connect_s:g} s ({connector.last_reason}): is `adaptra "
            "doctor --serve` running there, and does a firewall let its port through?"
        )
    return Wire(socks[0], deadline_s)
