"""Connections in the making: the listening side with its limits, and the dialling side with its retries."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from adaptra_plugin.backoff import Backoff
from adaptra_plugin.errors import HandshakeError
from adaptra_plugin.transport.log import RateLimit, log
from adaptra_plugin.transport.proxy import handshake
from adaptra_plugin.transport.proxy.handshake import (
    AcceptorMachine,
    Claim,
    InitiatorMachine,
    Purpose,
    Refused,
    Settings,
)
from adaptra_plugin.transport.proxy.loop import READ, WRITE, Loop, Timer
from adaptra_plugin.transport.proxy.tls import PREAMBLE, SAME, Tls
from adaptra_plugin.transport.types import Address

HALF_OPEN = 128
"""Connections that may be in the middle of their handshake at once."""
HALF_OPEN_GRACE_S = 0.25
"""When that many are, the oldest goes if it is older than this: a genuine peer needs a few milliseconds."""
_ACCEPTS_PER_TURN = 32
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

Machine = AcceptorMachine | InitiatorMachine


class HandshakeConnection:
    """Runs one handshake over a non-blocking socket; never reads a byte beyond what the handshake expects."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        machine: Machine,
        timeout_s: float,
        on_done: Callable[[HandshakeConnection], None],
        on_failed: Callable[[HandshakeConnection, HandshakeError], None],
    ) -> None:
        self.sock = sock
        self.machine = machine
        self.since = loop.clock()
        self._loop = loop
        self._on_done = on_done
        self._on_failed = on_failed
        self._out = bytearray(machine.start())
        self._in = bytearray()
        self._establish: Callable[[], int] | None = getattr(sock, "establish", None)  # TLS comes first
        self._pending: Callable[[], int] = getattr(sock, "pending", lambda: 0)
        self._timer = loop.call_later(
            timeout_s, lambda: self.fail(HandshakeError(f"it did not complete the handshake within {timeout_s:g} s"))
        )
        self._loop.watch(sock, READ | WRITE, self._ready)

    def _ready(self, mask: int) -> None:
        try:
            if self._establish is not None:
                if wanted := self._establish():
                    self._loop.watch(self.sock, wanted, self._ready)
                    return
                self._establish, mask = None, READ
            if self._out:
                del self._out[: self.sock.send(self._out)]
            more = bool(mask & READ)
            while more and not self.machine.done and self.machine.refused is None:
                self._read()
                more = self._pending() > 0  # of which no readiness will tell
        except BlockingIOError:
            pass  # what is left to send is watched for below
        except HandshakeError as error:
            self.fail(error)
            return
        except OSError as error:
            # errors of TLS have words of their own; those that trying again does not help say so
            kind = Refused if getattr(error, "final", False) else HandshakeError
            failure = kind(f"the connection broke during the handshake: {error.strerror or error}")
            failure.__cause__ = error
            self.fail(failure)
            return
        if self._out:
            self._loop.watch(self.sock, READ | WRITE, self._ready)
        elif self.machine.refused is not None:
            self.fail(Refused(self.machine.refused))
        elif self.machine.done:
            self._leave()
            self._on_done(self)
        else:
            self._loop.watch(self.sock, READ, self._ready)

    def _read(self) -> None:
        data = self.sock.recv(self.machine.expects - len(self._in))
        if not data:
            raise HandshakeError("it closed the connection during the handshake")
        self._in += data
        if self.machine.expects_magic and not handshake.MAGIC.startswith(self._in[: len(handshake.MAGIC)]):
            if self._in.startswith(PREAMBLE):
                raise Refused(f"it uses TLS, and adaptra.transport.tls is not set here: {SAME}")
            raise HandshakeError("what it sent is not a handshake of this transport")
        if len(self._in) == self.machine.expects:
            message, self._in = bytes(self._in), bytearray()
            self._out += self.machine.feed(message)
            if self._out:
                del self._out[: self.sock.send(self._out)]

    def _leave(self) -> None:
        self._timer.cancel()
        self._loop.watch(self.sock, 0, self._ready)

    def fail(self, error: HandshakeError) -> None:
        self.discard()
        self._on_failed(self, error)

    def discard(self) -> None:
        self._leave()
        self.sock.close()


class Acceptor:
    """Accepts connections and refuses those that do not prove the secret; strangers cost little and disturb nothing."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        secret: bytes,
        rank: int,
        settings: Settings,
        timeout_s: float,
        on_peer: Callable[[socket.socket, Claim, Settings], None],
        tls: Tls | None = None,
    ) -> None:
        self.refused = 0
        self._tls = tls
        self._loop = loop
        self._sock = sock
        self._machine = lambda: AcceptorMachine(secret, rank, settings)
        self._timeout_s = timeout_s
        self._on_peer = on_peer
        self._half_open: dict[HandshakeConnection, str] = {}  # oldest first, with the address of the other end
        self._limit = RateLimit(clock=loop.clock)
        self._pause: Timer | None = None
        loop.watch(sock, READ, self._accept)

    def _accept(self, _: int = READ) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if not self._room():
                self._rest(HALF_OPEN_GRACE_S)
                return
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP):
                    raise  # ours; all others are the network's, or a firewall's, and those of a connection that never was
                self._report("a new connection", f"it could not be taken ({error.strerror})")
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._rest(1.0)
                return
            name = _name(sock, address)
            try:
                tune(sock)
                taken = sock if self._tls is None else self._tls.accepted(sock)
                connection = HandshakeConnection(
                    self._loop, taken, self._machine(), self._timeout_s, self._done, self._failed
                )
            except OSError as error:  # it may have ended already
                sock.close()
                self._report(name, f"it could not be taken ({error.strerror or error})")
                continue
            self._half_open[connection] = name

    def _room(self) -> bool:
        if len(self._half_open) < HALF_OPEN:
            return True
        oldest = next(iter(self._half_open))
        if self._loop.clock() - oldest.since < HALF_OPEN_GRACE_S:
            return False
        oldest.fail(
            HandshakeError(f"{HALF_OPEN} connections were in the middle of their handshake, this one the longest")
        )
        return True

    def _rest(self, pause_s: float) -> None:
        """Leaves further connections in the kernel's queue for a while."""
        self._loop.watch(self._sock, 0, self._accept)
        if self._pause is None:
            self._pause = self._loop.call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.watch(self._sock, READ, self._accept)

    def _done(self, connection: HandshakeConnection) -> None:
        del self._half_open[connection]
        assert (
            isinstance(connection.machine, AcceptorMachine)
            and connection.machine.claim
            and connection.machine.peer_settings
        )
        claim = connection.machine.claim
        if (claim.purpose == Purpose.SHM) != (connection.sock.family == socket.AF_UNIX):
            self.refuse(connection.sock, f"rank {claim.source} asks for {claim} where that does not come")
            return
        self._on_peer(connection.sock, claim, connection.machine.peer_settings)

    def _failed(self, connection: HandshakeConnection, error: HandshakeError) -> None:
        self._report(self._half_open.pop(connection, "a new connection"), str(error))

    def _report(self, address: str, reason: str) -> None:
        self.refused += 1
        held = self._limit.allow()
        if held is not None:
            more = f" ({held} more were refused meanwhile)" if held else ""
            log.warning("refused: connection from %s: %s%s", address, reason, more)

    def refuse(self, sock: socket.socket, reason: str) -> None:
        """Refuses a connection that has proved the secret but has no place here."""
        try:
            name = _name(sock, sock.getpeername())
        except OSError:
            name = "a peer that has gone"
        self._report(name, reason)
        sock.close()

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        for connection in list(self._half_open):
            connection.discard()
        self._half_open.clear()
        self._loop.watch(self._sock, 0, self._accept)
        self._sock.close()


def _name(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX or not isinstance(address, tuple):
        return "a process of this host"
    return str(Address(str(address[0]), int(address[1])))


class Connector:
    """Dials until the connection stands, the other end refuses with a reason, or `close`.

    `address`: a TCP address, or the name of an abstract Unix socket. `on_failed` hears the error of each attempt that
    failed, before the next one is planned, and may `close` this dialer. Everybody is called from the loop, never from here:
    the owner has to have the dialer first.
    """

    def __init__(
        self,
        loop: Loop,
        address: Address | str,
        claim: Claim,
        secret: bytes,
        settings: Settings,
        timeout_s: float,
        source: str | None,
        on_done: Callable[[socket.socket, Claim, Settings], None],
        on_refused: Callable[[Claim, HandshakeError], None],
        on_failed: Callable[[Claim, Exception], None] = lambda claim, error: None,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self.claim = claim
        self.last_reason = "no answer yet"
        self._loop = loop
        self._address = address
        self._machine = lambda: InitiatorMachine(secret, claim, settings)
        self._timeout_s = timeout_s
        self._source = source
        self._on_done = on_done
        self._on_refused = on_refused
        self._on_failed = on_failed
        self._closed = False
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._connection: HandshakeConnection | None = None
        self._retry: Timer | None = loop.call_at(loop.clock(), self._dial)

    def _dial(self) -> None:
        self._retry = None
        sock: socket.socket | None = None
        try:
            sock, target = _socket_towards(self._address, self._source)
            status = sock.connect_ex(target)
            if status not in (0, errno.EINPROGRESS):
                raise OSError(status, os.strerror(status))
            dialled = sock if self._tls is None else self._tls.dialled(sock)
            self._connection = HandshakeConnection(
                self._loop, dialled, self._machine(), self._timeout_s, self._done, self._failed
            )
        except OSError as error:
            if sock is not None:
                sock.close()
            self._again(error)

    def _again(self, error: Exception) -> None:
        self.last_reason = str(error)
        self._on_failed(self.claim, error)
        if self._closed:
            return
        self._retry = self._loop.call_later(self._pauses.next(), self._dial)

    def _done(self, connection: HandshakeConnection) -> None:
        self._connection = None
        assert connection.machine.peer_settings is not None
        self._on_done(connection.sock, self.claim, connection.machine.peer_settings)

    def _failed(self, connection: HandshakeConnection, error: HandshakeError) -> None:
        self._connection = None
        if isinstance(error, Refused):
            self._on_refused(self.claim, error)
        else:
            self._again(error)

    def close(self) -> None:
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._connection is not None:
            self._connection.discard()
            self._connection = None


def _socket_towards(address: Address | str, source: str | None) -> tuple[socket.socket, Any]:
    """A non-blocking socket, and what to pass to `connect`. Raises OSError."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        tune(sock)
        return sock, b"\0" + address.encode()
    family, _, _, _, target = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune(sock)
        if source is not None:
            sock.bind((source, 0))
    except BaseException:
        sock.close()
        raise
    return sock, target


class Probe:
    """Finds out whether anybody listens at an address: a host that is up refuses if not.

    `on_answer(True)`: somebody does; `on_answer(False)`: refused; nothing if there is no answer until `close`.
    """

    def __init__(self, loop: Loop, address: Address, on_answer: Callable[[bool], None]) -> None:
        self._loop = loop
        self._on_answer = on_answer
        self._sock: socket.socket | None = None
        try:
            self._sock, target = _socket_towards(address, None)
            status = self._sock.connect_ex(target)
        except OSError as error:
            status = error.errno or 0
        if status in (0, errno.EINPROGRESS) and self._sock is not None:
            loop.watch(self._sock, WRITE, self._ready)
        else:
            loop.post(lambda: self._answer(status))

    def _ready(self, mask: int) -> None:
        if self._sock is not None:
            self._answer(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _answer(self, status: int) -> None:
        if self._sock is not None:
            self.close()
            if status in (0, errno.ECONNREFUSED):
                self._on_answer(status == 0)

    def close(self) -> None:
        if self._sock is not None:
            self._loop.watch(self._sock, 0, self._ready)
            self._sock.close()
            self._sock = None


def tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
