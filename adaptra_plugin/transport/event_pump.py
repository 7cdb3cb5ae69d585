"""The sockets that bring an endpoint records, without a thread: who waits, reads.

There is the data socket of the proxy, and one for each neighbour whose records come directly. Of the threads that wait for
something, one at a time has the *role* of the reader: it polls the sockets, hands every record to the endpoint's books, and
tells the others to look again. When what it waits for has come, it lets go of the role and another one takes it.
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
_LOOK_S = 0.02


class Source:
    """A socket that brings records.

    Args:
        sock: non-blocking; each packet holds whole records.
        dispatch: is handed every record, on the thread that has the role, which holds no lock then. An exception in it, that
            of a signal handler for one, leaves the record to the next reader: to be handed the newest one again has to
            complete what was done with it, or to do nothing.
        ended: is called on that thread, once nothing more can come.
        flush: is called before a reader sleeps; False: something waits for room in the socket.
    """

    __slots__ = ("dispatch", "ended", "flush", "over", "pending", "sock")

    def __init__(
        self,
        sock: socket.socket,
        dispatch: Callable[[bytes], None],
        ended: Callable[[], None] = lambda: None,
        flush: Callable[[], bool] = lambda: True,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.dispatch = dispatch
        self.ended = ended
        self.flush = flush
        self.over = False
        self.pending: deque[bytes] = deque()
        """Read and not handled yet: one packet, or what is left of it."""

    def read(self) -> bool:
        """Handles one packet, or the rest of one that an exception has interrupted; False if there is none."""
        pending = self.pending
        if not pending:
            if self.over:
                return False
            try:
                # from the socket into the queue within one call: a signal handler runs after it, not in between
                pending.extend(map(self.sock.recv, _ONE_PACKET))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True  # the other end has not read all; what it has sent can still be read
            except OSError:
                pending.append(b"")
        packet = pending[0]
        if not packet:
            self.ended()
            self.over = True
            pending.clear()
            return True  # whoever waits looks again
        while len(packet) > RECORD.size:
            self.dispatch(packet[: RECORD.size])
            pending[0] = packet = packet[RECORD.size :]
        self.dispatch(packet)
        pending.popleft()
        return True


class EventPump:
    """Records to and from the proxy, and from neighbours.

    Args:
        sock: the endpoint's end of the data pair; the event pump owns it.
        dispatch: see `Source`.
        spin_s: how long a reader tries again before it sleeps.
    """

    def __init__(self, sock: socket.socket, dispatch: Callable[[bytes], None], spin_s: float = 0.0) -> None:
        self._sock = sock
        self._sources: dict[int, Source] = {sock.fileno(): Source(sock, dispatch)}  # by descriptor
        self._spin_s = spin_s
        # Nothing else is locked while this is held, but predicates of waits may lock a lane for a moment: whoever holds a
        # lane's lock must not call in here.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._followers = 0
        self._reading = False
        self._closed = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)

    def add(self, source: Source) -> None:
        """One more socket to read; its owner closes it, after the event pump."""
        with self._lock:
            if self._closed:
                return
            self._sources = {**self._sources, source.sock.fileno(): source}
            self._poll.register(source.sock, select.POLLIN)
            if self._reading:  # it sleeps on the others only
                os.eventfd_write(self._bell, 1)

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
        with contextlib.suppress(OSError):
            if not put(self._sock, record, SEND_DEADLINE_S):
                raise TransportError(
                    f"the proxy has taken no record for {SEND_DEADLINE_S:g} s: its host is starved of CPU"
                )

    def drain(self) -> None:
        """Handles what has come, without waiting; nothing if another thread does it already."""
        mine = False
        try:
            with self._lock:
                if self._reading or self._closed:
                    return
                mine = self._reading = True
            while self._turn(0.0):
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
            now = time.monotonic()
            patience_s = 0.0 if now < spin_until else max(0.0, until - now)
            if self._turn(patience_s):
                if done():
                    return True
            elif done():
                return True
            elif self._closed or now >= until:
                return False

    def _turn(self, patience_s: float) -> bool:
        """Handles a packet of each socket that has one, or has one within `patience_s`; False if none has."""
        found, sources = False, self._sources
        for source in sources.values():
            if source.pending:  # the rest of what an exception has interrupted
                found = source.read() or found
            elif patience_s and not source.flush():
                patience_s = min(patience_s, _LOOK_S)
        for fd, _ in self._poll.poll(0 if found else min(patience_s, 3600.0) * 1e3):
            ready = sources.get(fd)
            if ready is not None:
                found = ready.read() or found
                if ready.over:
                    # of the proxy's, the control stream has ended too, and its thread finds out why
                    self._forget(fd, ready)
            elif fd == self._bell:
                try:
                    os.eventfd_read(self._bell)
                except BlockingIOError:
                    pass
        if found and self._followers:
            with self._lock:
                self._changed.notify_all()
        return found

    def remove(self, source: Source) -> None:
        """It is read no more, and may be closed."""
        self._forget(source.sock.fileno(), source)

    def _forget(self, fd: int, source: Source) -> None:
        with self._lock:
            self._sources = {key: other for key, other in self._sources.items() if other is not source}
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)

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


def put(sock: socket.socket, record: bytes, patience_s: float, meanwhile: Callable[[], None] | None = None) -> bool:
    """Writes to a socket whose other end reads, sooner or later; False if it has taken nothing for `patience_s`.

    `meanwhile`: is called now and then, because the other end may wait for this one. Raises OSError: the other end is gone.
    """
    try:
        sock.send(record)
        return True
    except BlockingIOError:
        pass
    until = time.monotonic() + patience_s
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while (left := until - time.monotonic()) > 0:
        writable.poll((left if meanwhile is None else min(left, _LOOK_S)) * 1e3)
        try:
            sock.send(record)
            return True
        except BlockingIOError:
            if meanwhile is not None:
                meanwhile()
    return False
