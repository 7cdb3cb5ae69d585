"""TLS under a TCP connection: both ends show a certificate of the job's authority before the handshake begins.

    acceptor  -> initiator   PREAMBLE
    initiator -> acceptor    PREAMBLE
    then TLS 1.3, then the handshake of `handshake`, inside

The preambles have nothing to do with security. They are there so that of two ends, one with TLS and one without, each can
say what is wrong, at once: without TLS the acceptor speaks first, with TLS the initiator does, and both would wait.

Ranks are reached by address, so certificates are not compared with names: what counts is who has signed them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from adaptra_plugin.errors import HandshakeError, TransportError
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.handshake import MAGIC, Refused
from adaptra_plugin.transport.proxy.loop import READ, WRITE

PREAMBLE = b"adaptra\x02"
"""Of the same length as what a handshake without TLS begins with, and different from it."""
SAME = "use the same configuration on all ranks"
_KEY = "adaptra.transport.tls"
_RECORD = 16 << 10
"""Longest piece that TLS encrypts at once (bytes)."""
_TURN = 1 << 20
"""Bytes for one connection before others get their turn."""


class TlsError(ConnectionError):
    """What TLS has to say, as an error of the connection. `final`: trying again does not help."""

    def __init__(self, text: str, *, final: bool = False) -> None:
        super().__init__(errno.EPROTO, text)
        self.final = final


class Blocked(BlockingIOError):
    """Nothing can be read before the socket is ready for `events`, which for TLS may be WRITE."""

    def __init__(self, events: int) -> None:
        super().__init__(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.events = events


class Tls:
    """Certificate, key and authority of this rank, as `transport.tls` names them.

    Raises:
        TransportError: a file is missing, cannot be read, or does not fit the others, or the certificate would be refused
            by a rank with the same authority, because it has expired, say.
    """

    def __init__(self, block: Mapping[str, Any]) -> None:
        paths = {name: Path(str(block[name])) for name in ("certificate", "key", "authority")}
        for name, path in paths.items():
            try:
                with path.open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise TransportError(f"{_KEY}.{name}: {path} cannot be read ({error.strerror})") from None
        if paths["key"].stat().st_mode & 0o077:
            log.warning("%s.key: others may read %s: give it mode 600", _KEY, paths["key"])
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, paths)
        self._server.num_tickets = 0  # nobody resumes a session; they would be bytes that no one waits for
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, paths)
        self._try(paths)

    def accepted(self, sock: socket.socket) -> socket.socket:
        """The listening side of a connection: a socket as far as handshakes and rails are concerned."""
        return cast(socket.socket, TlsSocket(sock, self._server))

    def dialled(self, sock: socket.socket) -> socket.socket:
        """The dialling side."""
        return cast(socket.socket, TlsSocket(sock, self._client))

    def _try(self, paths: Mapping[str, Path]) -> None:
        """Shows the certificate to ourselves, in memory."""
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [self._client.wrap_bio(back, there), self._server.wrap_bio(there, back, server_side=True)]
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    why = getattr(error, "verify_message", None) or error.reason
                    raise TransportError(
                        f"{_KEY}: the authority {paths['authority']} does not vouch for the certificate "
                        f"{paths['certificate']}: {why}"
                    ) from None


def _context(protocol: int, paths: Mapping[str, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(paths["certificate"], paths["key"], password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"{paths['key']} is not the key of {paths['certificate']}"
        else:
            text = f"{paths['certificate']} and {paths['key']} are no certificate and key (PEM): {error.reason}"
        raise TransportError(f"{_KEY}: {text}") from None
    try:
        context.load_verify_locations(cafile=paths["authority"])
    except ssl.SSLError as error:
        raise TransportError(
            f"{_KEY}.authority: {paths['authority']} is no certificate (PEM): {error.reason}"
        ) from None
    return context


def _no_password() -> str:
    # without this OpenSSL asks on the terminal, and waits
    raise TransportError(f"{_KEY}.key: the key is encrypted; there is nobody to ask for its password")


class TlsSocket:
    """A non-blocking socket with the methods that handshakes and rails use. They raise BlockingIOError and OSError as those of a
    socket do; `establish` has to be called first, until it returns 0."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._tls: ssl.SSLSocket | None = None
        self._context = context
        self._listening = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._out = PREAMBLE if self._listening else b""
        self._in = b""
        self._other: str | None = None  # the other end has no TLS

    # --- the beginning

    def establish(self) -> int:
        """Goes on with the preambles and the handshake of TLS. What to wait for before the next call; 0: it is done.

        Raises:
            Refused: trying again does not help.
            HandshakeError: with the reason.
            OSError: the connection broke.
        """
        try:
            if self._tls is None and not self._greet():
                return READ | WRITE * bool(self._out)
            assert self._tls is not None
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return READ
        except ssl.SSLWantWriteError:
            return WRITE
        except BlockingIOError:
            return READ | WRITE * bool(self._out)
        except ssl.SSLError as error:
            translated = _translated(error)
            kind = Refused if translated.final else HandshakeError
            raise kind(str(translated.strerror)) from None
        return 0

    def _greet(self) -> bool:
        """True once both preambles have been exchanged."""
        if self._out:
            self._out = self._out[self._sock.send(self._out) :]
        if self._other is not None:
            self._wait_for_the_end()
        data = self._sock.recv(len(PREAMBLE) - len(self._in))
        self._in += data
        if not data:
            raise HandshakeError(f"it closed the connection where TLS begins: is {_KEY} set there too? {SAME}")
        if not PREAMBLE.startswith(self._in):
            if not MAGIC.startswith(self._in):
                raise HandshakeError("what it sent is not a handshake of this transport")
            if self._in == MAGIC:
                self._other = f"it does not use TLS, and {_KEY} is set here: {SAME}"
                self._out = PREAMBLE
                return self._greet()
        if len(self._in) < len(PREAMBLE):
            return False
        if not self._listening:
            self._sock.send(PREAMBLE)  # the first bytes that are sent: there is room for them
        # from here on the descriptor is the wrapped one's
        self._tls = self._context.wrap_socket(
            self._sock, server_side=self._listening, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )
        return True

    def _wait_for_the_end(self) -> None:
        """The other end has been told that TLS is used here. Were this one closed now, with bytes in it that nobody has read,
        the kernel would reset the connection, and the other end could not read why."""
        if not self._out:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        try:
            while self._sock.recv(4096):
                pass
        except BlockingIOError:
            raise
        except OSError:
            pass
        raise Refused(str(self._other))

    # --- afterwards

    def recv_into(self, window: memoryview) -> int:
        """Several records, as far as they have come."""
        assert self._tls is not None
        total, room = 0, min(len(window), _TURN)
        while total < room:
            try:
                nbytes = self._tls.recv_into(window[total:room])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if total:
                    break
                raise Blocked(READ if isinstance(error, ssl.SSLWantReadError) else WRITE) from None
            except ssl.SSLError as error:
                raise _translated(error) from None
            if not nbytes:
                break
            total += nbytes
        return total

    def recv(self, limit: int) -> bytes:
        data = bytearray(limit)
        return bytes(data[: self.recv_into(memoryview(data))])

    def pending(self) -> int:
        """Bytes that are decrypted already: no readiness of the socket will tell of them."""
        return self._tls.pending() if self._tls is not None else 0

    def send(self, data: bytes | bytearray | memoryview) -> int:
        assert self._tls is not None
        try:
            return self._tls.send(data)
        except ssl.SSLWantWriteError:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        except ssl.SSLError as error:  # TLS 1.3 never has to read before it can write, so that is an error too
            raise _translated(error) from None

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """Small pieces go together in one record. What was refused has to be offered again, with the same bytes in front: a part
        of it may be encrypted already."""
        rest = [view for view in views if len(view)]
        total = 0
        while rest and total < _TURN:
            first = rest[0] if len(rest) == 1 or len(rest[0]) >= _RECORD else _gathered(rest)
            try:
                nbytes = self.send(first)
            except BlockingIOError:
                if total:
                    break
                raise
            total += nbytes
            while nbytes:
                step = min(nbytes, len(rest[0]))
                nbytes -= step
                rest[:1] = [rest[0][step:]] if step < len(rest[0]) else []
        return total

    # --- what a socket has

    @property
    def family(self) -> int:
        return self._any.family

    @property
    def _any(self) -> socket.socket:
        return self._tls if self._tls is not None else self._sock

    def fileno(self) -> int:
        return self._any.fileno()

    def getsockname(self) -> Any:
        return self._any.getsockname()

    def getpeername(self) -> Any:
        return self._any.getpeername()

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._any.setsockopt(level, option, value)

    def close(self) -> None:
        """At once; the other end sees a connection that ends, and a rail that is gone."""
        self._any.close()


def _gathered(views: Sequence[memoryview]) -> bytes:
    """The first bytes of all of them, as many as fit into a record."""
    parts, room = [], _RECORD
    for view in views:
        parts.append(view[:room])
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)


def _translated(error: ssl.SSLError) -> TlsError:
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsError(f"its certificate is refused: {error.verify_message}", final=True)
    if "ALERT" in reason:
        words = reason.partition("ALERT_")[2].replace("_", " ").lower() or reason
        return TlsError(f"it refuses the certificate of this rank, or TLS with it: {words}", final=True)
    if isinstance(error, ssl.SSLEOFError):
        return TlsError("it closed the connection in the middle of TLS")
    return TlsError(f"what it sent is not TLS as it should be: {reason.replace('_', ' ').lower()}")
