"""The data socket between an endpoint and its proxy, without a thread: who waits, reads.

Of the threads that wait for something, one at a time has the *role* of the reader: it polls the socket, hands every
record to the endpoint's books, and tells the others to look again. When what it waits for has come, it lets go of the
role and another one takes it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.bridge import MAX_PACKET, RECORD, Op

_ONE_PACKET = (MAX_PACKET,)
SEND_DEADLINE_S = 60.0
"""Longest wait for the proxy to take a record out of a full socket; it reads all the time."""


class EventPump:
    """Records to and from the proxy.

    Args:
        sock: the endpoint's end of the data pair; the event pump owns it.
        dispatch: is handed every record, on the thread that has the role, which holds no lock then. An exception in it, that
            of a signal handler for one, leaves the record to the next reader: to be handed the newest one again has to
            complete what was done with it, or to do nothing.
        spin_s: how long a reader tries again before it sleeps.
    """

    def __init__(self, sock: socket.socket, dispatch: Callable[[bytes], None], spin_s: float = 0.0) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._dispatch = dispatch
        self._spin_s = spin_s
        # Nothing else is locked while this is held, but predicates of waits may lock a lane for a moment: whoever holds a
        # lane's lock must not call in here.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._followers = 0
        self._reading = False
        self._closed = False
        self._ended = False  # the proxy's end is closed
        self._pending: deque[bytes] = deque()  # read and not handled yet: one packet, or what is left of it
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)

    def post(
        self,
        op: Op,
        rank: int,
        direction: int,
        lane: int,
        position: int = 0,
        total: int = 0,
        value: float = 0.0,
        after: int = 0,
    ) -> None:
        """Sends one record. One that cannot be delivered, because the proxy is gone, is dropped: whoever waits for its
        effect hears why."""
        record = RECORD.pack(op, direction, lane, 0, rank, position, total, value, after)
        try:
            self._sock.send(record)
        except BlockingIOError:
            self._insist(record)
        except OSError:
            pass

    def _insist(self, record: bytes) -> None:
        until = time.monotonic() + SEND_DEADLINE_S
        writable = select.poll()
        writable.register(self._sock, select.POLLOUT)
        while (left := until - time.monotonic()) > 0:
            writable.poll(left * 1e3)
            try:
                self._sock.send(record)
                return
            except BlockingIOError:
                continue
            except OSError:
                return
        raise TransportError(f"the proxy has taken no record for {SEND_DEADLINE_S:g} s: its host is starved of CPU")

    def drain(self) -> None:
        """Handles what has come, without waiting; nothing if another thread does it already."""
        mine = False
        try:
            with self._lock:
                if self._reading or self._closed:
                    return
                mine = self._reading = True
            while self._read():
                pass
        finally:
            if mine:
                self._reading = False  # before any call: none of them may keep the role from being let go
                self._let_go()

    def wait(self, done: Callable[[], bool], until: float) -> bool:
        """Returns when `done()` holds (True), or at `until` (s, monotonic clock). `done` is called often, on this thread;
        it changes by a record, or somebody calls `wake`."""
        mine = False
        while not done():
            try:
                with self._lock:
                    # counted before it looks: the reader, which looks at the count without the lock, has either handled
                    # its records by then, or notifies
                    self._followers += 1
                    try:
                        if done():
                            return True
                        left = until - time.monotonic()
                        if left <= 0:
                            return False
                        if self._reading or self._closed:
                            self._changed.wait(min(left, threading.TIMEOUT_MAX))
                            continue
                        mine = self._reading = True
                    finally:
                        self._followers -= 1
                return self._read_until(done, until)
            finally:
                if mine:
                    self._reading = False  # as in `drain`
                    self._let_go()
        return True

    def wake(self) -> None:
        """What some thread waits for may have changed by other means than a record."""
        with self._lock:
            if self._followers:
                self._changed.notify_all()
            if self._reading and not self._closed:
                os.eventfd_write(self._bell, 1)

    def _let_go(self) -> None:
        with self._lock:
            if self._closed and not self._reading:
                self._close()
            if self._followers:
                self._changed.notify_all()

    def _read_until(self, done: Callable[[], bool], until: float) -> bool:
        spin_until = time.monotonic() + self._spin_s if self._spin_s else 0.0
        while True:
            while self._read():
                if done():
                    return True
            if done():
                return True
            now = time.monotonic()
            if self._closed or now >= until:
                return done()
            if now >= spin_until:
                self._sleep(until - now)

    def _sleep(self, limit_s: float) -> None:
        for fd, _ in self._poll.poll(min(limit_s, 3600.0) * 1e3):
            if fd == self._bell:
                try:
                    os.eventfd_read(self._bell)
                except BlockingIOError:
                    pass

    def _read(self) -> bool:
        """Handles one packet, or the rest of one that an exception has interrupted; False if there is none."""
        pending = self._pending
        if not pending:
            if self._ended:
                return False
            try:
                # from the socket into the queue within one call: a signal handler runs after it, not in between
                pending.extend(map(self._sock.recv, _ONE_PACKET))
            except BlockingIOError:
                return False
            except OSError:
                pending.append(b"")
        packet = pending[0]
        if not packet:
            # the control stream has ended too, and its thread finds out why
            self._ended = True
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._sock)
            pending.clear()
            return False
        while len(packet) > RECORD.size:
            self._dispatch(packet[: RECORD.size])
            pending[0] = packet = packet[RECORD.size :]
        self._dispatch(packet)
        pending.popleft()
        if self._followers:
            with self._lock:
                self._changed.notify_all()
        return True

    def close(self) -> None:
        """Gives the descriptors back, at once or when the reader lets go. What others wait for has to hold by now."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._reading:
                os.eventfd_write(self._bell, 1)
            else:
                self._close()
            self._changed.notify_all()

    def _close(self) -> None:
        if self._bell >= 0:
            self._sock.close()
            os.close(self._bell)
            self._bell = -1

    def abandon(self) -> None:
        """In a forked child: the same without a lock, which another thread of the parent may have held."""
        self._closed = True
        self._close()
