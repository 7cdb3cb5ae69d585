"""The first thing on a Unix socket between two proxies, after the handshake: the descriptors of each other's rings."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence

from adaptra_plugin.transport.proxy.loop import READ, Loop

_HELLO = b"rings"
MAX_RINGS = 64


class RingExchange:
    """Sends descriptors, waits for as many of the peer's, and hands the socket back.

    `on_done(sock, descriptors)` or `on_failed(reason)`, once; the descriptors are the receiver's to close.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        rings: Sequence[int],
        on_done: Callable[[socket.socket, list[int]], None],
        on_failed: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._count = len(rings)
        self._on_done = on_done
        self._on_failed = on_failed
        self._done = False
        self._timer = loop.call_later(timeout_s, lambda: self._fail(f"no rings came within {timeout_s:g} s"))
        loop.watch(sock, READ, self._ready)
        try:
            socket.send_fds(sock, [_HELLO], list(rings))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            loop.post(lambda: self._fail(reason))

    def _ready(self, mask: int) -> None:
        size = array.array("i").itemsize
        received = array.array("i")
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                len(_HELLO), socket.CMSG_SPACE(MAX_RINGS * size), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(os.strerror(error.errno or 0))
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(payload[: len(payload) - len(payload) % size])
        if data != _HELLO or len(received) != self._count:
            for fd in received:
                os.close(fd)
            self._fail(f"{len(received)} rings came where {self._count} were expected")
            return
        self._end()
        self._on_done(self._sock, list(received))

    def _end(self) -> None:
        self._done = True
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
