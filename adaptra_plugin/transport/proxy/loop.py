"""The proxy's event loop: sockets, timers, and a doorbell that other threads ring."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from adaptra_plugin.transport.proxy.pulse import BEAT_S, Pulse

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_EVENTS = 64  # that one look may find


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class Descriptor:
    """A bare file descriptor, for `Loop.watch`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class _Doorbell:
    """Wakes the loop; rung many times between two looks it costs one system call."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rung = False
        self._lock = threading.Lock()  # against a ring after `close`, into a descriptor that is somebody else's by then

    def ring(self) -> None:
        if self._rung:
            return
        with self._lock:
            if not self._rung:
                self._rung = True
                os.eventfd_write(self.fd, 1)

    def hush(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        # cleared before the caller looks at its queue, so that a ring in between is not lost
        self._rung = False

    def close(self) -> None:
        # with a limit, because a fork may have copied the lock while another thread held it, for ever
        self._lock.acquire(timeout=1.0)
        self._rung = True
        self._lock.release()
        os.close(self.fd)


class Timer:
    __slots__ = ("cancelled", "run", "when")

    def __init__(self, when: float, run: Callable[[], None]) -> None:
        self.when = when
        self.run = run
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clockwork(Protocol):
    """What those need of a loop who watch no sockets."""

    def clock(self) -> float: ...
    def call_at(self, when: float, run: Callable[[], None]) -> Timer: ...
    def post(self, run: Callable[[], None]) -> None: ...


class Loop:
    """Single-threaded, except for `post` and `stop`, which any thread may call. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.pulse = Pulse()
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}  # events and handler, by descriptor
        self._bell = _Doorbell()
        self._epoll.register(self._bell.fd, READ)
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopped = self._closed = False
        self.spin_s = 0.0
        """How long to look again and again (s) before sleeping until something happens."""
        self.turn_ended: Callable[[], None] = lambda: None
        """Called after each turn: what the turn's events have caused together goes out now."""

    def post(self, run: Callable[[], None]) -> None:
        """Runs `run` on the loop's thread, soon."""
        self._posted.append(run)
        self._bell.ring()

    def stop(self) -> None:
        self._stopped = True
        self._bell.ring()

    def call_at(self, when: float, run: Callable[[], None]) -> Timer:
        timer = Timer(when, run)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay_s: float, run: Callable[[], None]) -> Timer:
        return self.call_at(self.clock() + delay_s, run)

    def watch(self, sock: HasDescriptor, events: int, handler: Callable[[int], None]) -> None:
        """Calls `handler(mask)` when `sock` is ready for one of `events`; 0 stops watching. Idempotent."""
        if self._closed:
            return
        fd = sock.fileno()
        known = self._watched.get(fd)
        if not events:
            if known is not None:
                del self._watched[fd]
                self._epoll.unregister(fd)
        elif known is None:
            self._epoll.register(fd, events)
            self._watched[fd] = (events, handler)
        elif known != (events, handler):
            if known[0] != events:
                self._epoll.modify(fd, events)
            self._watched[fd] = (events, handler)

    def run(self) -> None:
        """Until `stop`. An exception of a handler ends the loop and is the caller's."""
        while not self._stopped:
            ready = [(fd, events, self._watched.get(fd)) for fd, events in self._look()]
            for fd, events, known in ready:
                if known is None:
                    self._bell.hush()
                elif self._watched.get(fd) is known:  # an earlier handler may have closed this one
                    # errors and hang-ups are for whoever waits
                    mask = (READ if events & ~WRITE else 0) | (WRITE if events & ~READ else 0)
                    known[1](mask & known[0])
            for _ in range(len(self._posted)):
                self._posted.popleft()()
            # timers last: what has already come counts before a timeout does
            now = self.clock()
            while self._timers and self._timers[0][0] <= now:
                _, _, timer = heapq.heappop(self._timers)
                if not timer.cancelled:
                    timer.run()
            self.pulse.worked()
            self.turn_ended()

    def _look(self) -> list[tuple[int, int]]:
        """Descriptors that are ready, and for what."""
        patience = self._patience()
        if self.spin_s and patience != 0.0:
            until = time.monotonic() + (self.spin_s if patience is None else min(self.spin_s, patience))
            while time.monotonic() < until:
                if ready := self._epoll.poll(0, _EVENTS):
                    return ready
            patience = self._patience()
        while True:
            step = BEAT_S if patience is None else min(patience, BEAT_S)
            ready = self._epoll.poll(step, _EVENTS)
            slept = self.pulse.slept(step)
            if patience is not None:
                patience -= slept
            if ready or (patience is not None and patience <= 0):
                return ready

    def _patience(self) -> float | None:
        if self._posted:
            return 0.0
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - self.clock())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._epoll.close()
        self._bell.close()
