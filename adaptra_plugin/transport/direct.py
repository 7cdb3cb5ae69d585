"""The short way between two ranks of one host: their records go from rank to rank, with no proxy in between.

Each has mapped the other's rings, so a record is all that has to travel. The pair of sockets comes with the rings. It breaks
only if somebody closes it, or with a process; then what the peer has not consumed is told to the proxies (`SendLane.fall_back`).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import deque

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.bridge import MAX_PACKET, RECORD, Op, packed_time
from adaptra_plugin.transport.event_pump import EventPump, put
from adaptra_plugin.transport.types import Direction

_BUFFER_BYTES = 1 << 20  # asked for; the system gives less, room for some hundred records
_PACKET_RECORDS = MAX_PACKET // RECORD.size
_MOST_LATE = 32
"""Messages that may be copied out before the peer hears of it."""


class DirectPath:
    """This rank's end of the pair. Records are those of a proxy (`bridge.Op`), and bear the sender's rank.

    Args:
        sock: this end; taken over.
        me: this rank.
        deadline_s: longest wait for a peer that does not read.
        untold: room (bytes) that may be free here without the peer knowing.
    """

    def __init__(self, sock: socket.socket, me: int, pump: EventPump, deadline_s: float, untold: int) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self.sock = sock
        self.ended = False
        """Nothing more comes."""
        self._me = me
        self._pump = pump
        self._deadline_s = deadline_s
        self._late: deque[bytes] = deque()  # news of room that has not been sent
        self._untold = untold
        self._held_back = 0  # bytes of room in them
        self._lock = threading.Lock()  # of the order in which they go

    def arrived(self, direction: Direction, lane: int, position: int, total: int) -> None:
        """A message lies in the ring of a lane. Blocks while the socket is full, and reads meanwhile.

        Raises TransportError: the peer reads nothing.
        """
        self._put(Op.ARRIVED, direction, lane, position, total)

    def stuck(self, direction: Direction, lane: int, stuck: bool) -> None:
        """A producer waits for room in a lane, or no longer."""
        self._put(Op.PEER_STUCK, direction, lane, 0, int(stuck))

    def consumed(self, direction: Direction, lane: int, position: int, total: int, *, urgent: bool) -> None:
        """A message of `total` bytes has been copied out. Unless it is `urgent`, the peer, which a packet would wake, hears of that with
        the next record, when this rank has nothing else to do, or when it is much (`untold`). Never blocks: a peer that reads
        nothing now may wait for this rank elsewhere."""
        record = self._packed(Op.CONSUMED, direction, lane, position, 0)
        with self._lock:
            self._late.append(record)
            self._held_back += total
            much = self._held_back >= self._untold
        if urgent or much or len(self._late) % _MOST_LATE == 0:  # a socket that was full is not tried each time
            self.flush()

    def flush(self) -> bool:
        """Sends what has waited; False if the socket is full."""
        late = self._late
        while late:
            with self._lock:
                count = min(len(late), _PACKET_RECORDS)
                if not count:  # another thread was quicker, and an empty packet would be the end
                    return True
                try:
                    self.sock.send(b"".join(itertools.islice(late, count)))
                except BlockingIOError:
                    return False
                except OSError:
                    late.clear()
                    self.end()
                    return True
                self._sent(count)
        return True

    def _sent(self, count: int) -> None:
        # after the packet: an exception in between has it sent once more, which does nothing
        for _ in range(count):
            self._late.popleft()
        self._held_back = 0

    def _packed(self, op: Op, direction: Direction, lane: int, position: int, total: int) -> bytes:
        return RECORD.pack(op, direction, lane, 1, self._me, position, total, 0.0, packed_time(time.monotonic()))

    def _put(self, op: Op, direction: Direction, lane: int, position: int, total: int) -> None:
        try:
            self._insist(self._packed(op, direction, lane, position, total))
        except BaseException:
            self.end()
            raise

    def _insist(self, record: bytes) -> None:
        try:
            with self._lock:
                count = min(len(self._late), _PACKET_RECORDS - 1)
                try:
                    self.sock.send(b"".join((*itertools.islice(self._late, count), record)) if count else record)
                    return self._sent(count)
                except BlockingIOError:
                    pass
            taken = put(self.sock, record, self._deadline_s, self._pump.drain)
        except OSError:
            return self.end()
        if not taken:
            raise TransportError(
                f"the peer has taken no record for {self._deadline_s:g} s: its process is stopped, or computes for longer than "
                "adaptra.transport.deadline_s"
            )

    def shut(self) -> None:
        """Nothing more is sent: the peer can read what has been, until its end."""
        self.flush()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """A record may not have gone out, and none must be left out: both ends see the end of the path, and do without it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()
