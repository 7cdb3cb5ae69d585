"""What an endpoint and its proxy say to each other, over two pairs of connected sockets.

The *data* pair (SOCK_SEQPACKET) carries fixed records, several a packet: transfers to start, what has arrived. The
*control* pair (SOCK_STREAM) carries JSON objects with a length in front, and descriptors of shared memory: everything
rare. Both ends belong to one job and one user: nothing here is authenticated, and nothing is pickled.

Control messages to the proxy, by `op`:
    start    me {rank, stage, host}, config (transport block), secret (hex), bind, shown (in the endpoint info, for a wildcard), simulate,
             clock_offset_s
    connect  peers [{rank, stage, host, endpoint_info, neighbour}], coordinator, deadline_s, remind_s;
             descriptors: for each neighbour in the order of `peers`, for each direction, for each lane: the ring that this
             rank fills, then the receive ring of what the peer fills
    mapped   rank (the peer's rings are mapped: segments may come by reference)
    unmapped rank, why (they cannot be mapped: the link does without shared memory)
    control  rank, message (JSON text; it is passed on as it is)
    stats    id
    close    linger_s
and from it, by `event`:
    ready           card (text)
    start_failed    text
    connected       links {rank: {rails [names], why, direct}}; direct: both ends have the pair of sockets for it
    connect_failed  error (class name), text
    memfds          rank, direct, descriptors: the peer's rings, for each direction, for each lane, and if `direct`, this rank's end
                    of a pair of sockets (SOCK_SEQPACKET) over which it exchanges records with the peer itself
    lost, left      rank, error (class name), reason, remedy
    control         messages: [rank, message (an object)], at most `MOST_TOGETHER`
    backlog         rank, waiting (bytes): the control messages that wait for `rank` have become more, or less, than may be
    rail            rank, rail, state, why, ... (a step in the life of a rail: for the report)
    stats           id, data
    log             level, text
    failed          text (last words of a proxy that cannot go on)
    closed
"""

from __future__ import annotations

import array
import enum
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

from adaptra_plugin.errors import TransportError

RECORD = struct.Struct("<BBBBiQQdQ")
"""op, direction, lane, flags, rank, message (position in the ring), total (bytes), value, after."""
MAX_PACKET = 64 * RECORD.size
MAX_MESSAGE_BYTES = 64 << 20
MAX_CONTROL_BACKLOG = 64 << 20
"""Control messages that may wait for one peer (bytes); one that reads nothing must not fill this rank's memory."""
MOST_TOGETHER = 8
"""Control messages of peers that come in one event: of 4 MiB each, with room for escapes."""
_LENGTH = struct.Struct("<II")  # bytes of JSON, descriptors
_MAX_DESCRIPTORS = 240  # that one call may carry


class Op(enum.IntEnum):
    """Records; those below 16 go to the proxy, the others come from it."""

    SEND = 1
    """A message lies in the ring. `value`: when it was complete (s, clock of the endpoint); `after`: 1 + position of an earlier
    message of the same key that is not consumed yet and has to arrive before, 0: none."""
    RELEASE = 2
    """A received message has been copied out: its room is free. Answered with nothing."""
    STUCK = 3
    """A producer waits for room in this lane (`total` 1) or no longer (0)."""
    ITERATION = 4
    """What is sent from now on belongs to iteration `message`: injected faults depend on it."""
    ARRIVED = 16
    """A whole message has come; `flags` bit 0: it lies in the peer's ring, not in the receive ring; `value`: delay (ms); `after`: when
    (`packed_time`)."""
    ACKED = 17
    """A sent message has arrived at the peer's proxy."""
    CONSUMED = 18
    """... and has been copied out there: its room in this rank's ring is free."""
    PEER_STUCK = 19
    """The peer's producer waits for room in the ring that this rank empties (`total` 1), or no longer (0)."""
    LOST = 20
    """Nothing more goes to, or comes from, `rank`; the control stream says why, and said so before."""
    STOOD = 21
    """The proxy of `rank` (-1: this one) stood still, from `value` (s, clock of the endpoint) on for `total` microseconds."""


_EARLIEST_S = 1e9  # clocks of tests may be behind


def packed_time(seconds: float) -> int:
    """A time of the endpoint's clock as a record has it: in microseconds."""
    return round((seconds + _EARLIEST_S) * 1e6)


def unpacked_time(microseconds: int) -> float:
    return microseconds / 1e6 - _EARLIEST_S


def pairs() -> tuple[tuple[socket.socket, socket.socket], tuple[socket.socket, socket.socket]]:
    """(data, control), each (endpoint's end, proxy's end); blocking."""
    data = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        return data, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        for end in data:
            end.close()
        raise


def encode(message: dict[str, Any], descriptors: int = 0) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise TransportError(f"a message of {len(data)} bytes between endpoint and proxy; {MAX_MESSAGE_BYTES} may be")
    return _LENGTH.pack(len(data), descriptors) + data


_decode = json.JSONDecoder().raw_decode  # `loads` looks for blanks around it, which takes longer than a small object


def _parse(data: bytearray) -> dict[str, Any]:
    try:
        text = data.decode()
        message, end = _decode(text)
        if end < len(text):
            raise ValueError(f"{len(text) - end} characters follow the object")
    except (ValueError, RecursionError) as error:
        raise TransportError(f"{len(data)} bytes between endpoint and proxy are not JSON: {error}") from None
    if not isinstance(message, dict):
        raise TransportError(f"a {type(message).__name__} came between endpoint and proxy instead of an object")
    return message


class Reader:
    """Takes control messages with their descriptors out of a stream; blocking or not, as the socket is."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        self._cut = False  # the descriptors of the next message that has some were lost

    def receive(self) -> list[tuple[dict[str, Any], list[int]]] | None:
        """Reads once; the messages that are complete. None: the other end is closed. A message whose descriptors found no
        room in this process comes without any.

        Raises BlockingIOError, and TransportError if what came is no message of the bridge.
        """
        size = array.array("i").itemsize
        data, ancillary, flags, _ = self._sock.recvmsg(
            1 << 18, socket.CMSG_SPACE(_MAX_DESCRIPTORS * size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % size])
                self._descriptors.extend(received)
        if not data:
            return None
        if flags & socket.MSG_CTRUNC:  # this process has no room for more descriptors: the kernel has dropped some
            self._cut = True
            while self._descriptors:
                os.close(self._descriptors.popleft())
        self._buffer += data
        found = []
        while len(self._buffer) >= _LENGTH.size:
            length, count = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise TransportError(f"a message of {length} bytes is announced between endpoint and proxy")
            end = _LENGTH.size + length
            if count and self._cut and len(self._buffer) >= end:
                count, self._cut = 0, False
            if len(self._buffer) < end or len(self._descriptors) < count:
                break
            message = _parse(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            found.append((message, [self._descriptors.popleft() for _ in range(count)]))
        return found


class Writer:
    """Queues control messages for a stream; `flush` writes what the socket takes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()

    def put(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """The descriptors must stay open until `flush` has returned True."""
        data = memoryview(encode(message, len(descriptors)))
        rest = list(descriptors)
        # descriptors travel with the first bytes, a limited number a call, so a long list takes a byte for each batch
        while len(rest) > _MAX_DESCRIPTORS:
            self._queue.append((data[:1], rest[:_MAX_DESCRIPTORS]))
            data, rest = data[1:], rest[_MAX_DESCRIPTORS:]
        self._queue.append((data, rest))

    def flush(self) -> bool:
        """True when nothing waits any more. Raises OSError when the other end is gone."""
        while self._queue:
            data, descriptors = self._queue[0]
            try:
                sent = socket.send_fds(self._sock, [data], descriptors) if descriptors else self._sock.send(data)
            except BlockingIOError:
                return False
            if sent < len(data):
                self._queue[0] = (data[sent:], ())
            else:
                self._queue.popleft()
        return True
