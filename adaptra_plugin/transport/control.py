"""The control stream between an endpoint and its proxy, served by a thread of its own. Nothing here touches data."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.bridge import Reader, Writer

MAX_CONTROL_BYTES = 4 << 20
"""Longest control message between ranks (bytes of JSON)."""


def encode_control(message: dict[str, Any]) -> str:
    """JSON of a control message between ranks, as the proxies pass it on.

    Raises:
        TransportError: if it is no JSON object, or longer than `MAX_CONTROL_BYTES`.
    """
    if not isinstance(message, dict):
        raise TransportError(f"a control message is a dict, not {type(message).__name__}")
    try:
        text = json.dumps(message, separators=(",", ":"))  # ASCII: as many bytes as characters
    except (TypeError, ValueError, RecursionError) as error:
        raise TransportError(f"control message {sorted(map(str, message))} is not JSON: {error}") from None
    if len(text) > MAX_CONTROL_BYTES:
        raise TransportError(
            f"control message {sorted(map(str, message))} has {len(text)} bytes; at most {MAX_CONTROL_BYTES} fit"
        )
    return text


class ControlStream:
    """JSON objects with descriptors, both ways.

    Args:
        sock: the endpoint's end of the control pair; the stream owns it.
        handle: is called on the thread with every message and its descriptors, which it takes over.
        over: is called on the thread at the end, with the error if one came up, else None.
        name: of the thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[dict[str, Any], list[int]], None],
        over: Callable[[BaseException | None], None],
        name: str,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._handle = handle
        self._over = over
        self._lock = threading.Lock()
        self._writer = Writer(sock)
        self._waiting = False  # the socket has not taken everything
        self._calls: deque[Callable[[], None]] = deque()
        self._closed = False
        self._stopped = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Any thread; never blocks. The descriptors stay open until the stream ends. Dropped if the proxy is gone."""
        with self._lock:
            if self._closed:
                return
            self._writer.put(message, descriptors)
            if not self._waiting:
                self._flush()
            if self._waiting:
                os.eventfd_write(self._bell, 1)

    def call(self, function: Callable[[], None]) -> None:
        """Runs a function on the thread, soon; any thread."""
        with self._lock:
            if not self._closed:
                self._calls.append(function)
                os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """On the thread: nothing more is read."""
        self._stopped = True

    def _flush(self) -> None:
        try:
            self._waiting = not self._writer.flush()
        except OSError:
            self._waiting = False  # the other end is gone, which the thread notices

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._serve()
        except BaseException as caught:  # noqa: BLE001  whatever it is, nobody may wait for a thread that has died
            error = caught
        try:
            self._over(error)
        finally:
            self.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        reader = Reader(self._sock)
        watching_out = False
        while not self._stopped:
            ready = dict(poll.poll())
            if ready.get(self._bell):
                os.eventfd_read(self._bell)
            with self._lock:
                if self._waiting:
                    self._flush()
                if self._waiting != watching_out:
                    watching_out = self._waiting
                    poll.modify(self._sock, select.POLLIN | (select.POLLOUT if watching_out else 0))
            while self._calls and not self._stopped:
                self._calls.popleft()()
            if ready.get(self._sock.fileno(), 0) & ~select.POLLOUT:
                try:
                    found = reader.receive()
                except BlockingIOError:
                    continue
                except ConnectionError:
                    found = None
                if found is None:
                    return
                for message, descriptors in found:
                    self._handle(message, descriptors)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._sock.close()
            os.close(self._bell)

    def abandon(self) -> None:
        """In a forked child: `close` without the lock, which another thread of the parent may have held."""
        self._close()
