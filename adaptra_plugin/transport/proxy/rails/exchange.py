"""The first thing on a Unix socket between two proxies, after the handshake: the descriptors of each other's rings, and of a pair
of sockets over which the two endpoints tell each other of messages, if both ends want that."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence

from adaptra_plugin.transport.proxy.loop import READ, Loop

_HELLO, _DIRECT = b"rings 0", b"rings 1"  # of one length: the peer's first frame may come right behind
MAX_RINGS = 64


class RingExchange:
    """Sends descriptors, waits for as many of the peer's, and hands the socket back.

    `on_done(sock, rings, direct)` or `on_failed(reason)`, once; the descriptors are the receiver's to close. `direct`: this side's end
    of the pair, or None.

    Args:
        direct: whether this end wants it.
        pairs: whether this end makes the pair.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        rings: Sequence[int],
        on_done: Callable[[socket.socket, list[int], int | None], None],
        on_failed: Callable[[str], None],
        timeout_s: float,
        *,
        direct: bool = False,
        pairs: bool = False,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._count = len(rings)
        self._on_done = on_done
        self._on_failed = on_failed
        self._done = False
        self._direct, self._pairs = direct, pairs
        self._mine: socket.socket | None = None
        self._timer = loop.call_later(timeout_s, lambda: self._fail(f"no rings came within {timeout_s:g} s"))
        loop.watch(sock, READ, self._ready)
        try:
            offered = list(rings)
            if direct and pairs:
                self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    socket.send_fds(sock, [_DIRECT], [*offered, theirs.fileno()])
            else:
                socket.send_fds(sock, [_DIRECT if direct else _HELLO], offered)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            loop.post(lambda: self._fail(reason))

    def _ready(self, mask: int) -> None:
        size = array.array("i").itemsize
        received = array.array("i")
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                len(_DIRECT), socket.CMSG_SPACE(MAX_RINGS * size), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(os.strerror(error.errno or 0))
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(payload[: len(payload) - len(payload) % size])
        both = data == _DIRECT and self._direct
        theirs = data == _DIRECT and not self._pairs
        if data not in (_HELLO, _DIRECT) or len(received) != self._count + theirs:
            for fd in received:
                os.close(fd)
            self._fail(f"{len(received)} rings came where {self._count} were expected")
            return
        rings, rest = list(received[: self._count]), list(received[self._count :])
        direct: int | None = None
        if both:
            direct = self._mine.detach() if self._mine is not None else rest.pop()
        for fd in rest:
            os.close(fd)
        self._end()
        self._on_done(self._sock, rings, direct)

    def _end(self) -> None:
        self._done = True
        if self._mine is not None:
            self._mine.close()
        self._timer.cancel()
        self._loop.watch(self._sock, 0, self._ready)

    def _fail(self, reason: str) -> None:
        if not self._done:
            self.close()
            self._on_failed(reason)

    def close(self) -> None:
        if not self._done:
            self._end()
            self._sock.close()
