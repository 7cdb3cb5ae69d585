"""Authenticated TCP connections, seen from the proxy: bytes between sockets, rings and books.

`DataStream` carries the frames of one pair of lanes. `ServiceStream` carries what is small and must not wait behind
data: pings, control messages. Each stream ends with a goodbye frame; an end without one means that the peer is lost.
"""

from __future__ import annotations

import functools
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Protocol

from adaptra_plugin.transport import frames
from adaptra_plugin.transport.frames import HEADER_BYTES, TIMES, Header, Kind, MalformedFrame
from adaptra_plugin.transport.lanes import Arrived, RecvLane, SendLane
from adaptra_plugin.transport.loop import READ, WRITE, Loop
from adaptra_plugin.transport.tensors import BadLayout, understand

_ROUNDS = 8  # system calls for one stream before others get their turn
_BATCH = 16  # frames handed over in one system call
_READ_BYTES = 1 << 17  # at a time, where bytes do not go to a ring


def _words(error: OSError) -> str:
    return f"its connection broke ({os.strerror(error.errno or 0)})"


class Owner(Protocol):
    """Who is told about a stream's life: the peer it belongs to."""

    def heard_goodbye(self, stream: Stream) -> None: ...
    def ended(self, stream: Stream, reason: str) -> None: ...
    def malformed(self, stream: Stream, error: MalformedFrame) -> None: ...
    def finished(self, stream: Stream) -> None: ...
    def ping_answered(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None: ...
    def control(self, message: dict[str, Any]) -> None: ...
    def delay(self, remote_sent: float, received: float) -> float: ...


class Stream(ABC):
    """A non-blocking socket after its handshake."""

    def __init__(self, loop: Loop, sock: socket.socket, owner: Owner, name: str) -> None:
        self.name = name
        self.goodbye_heard = False
        self.closed = False
        self.finished_writing = False
        self.at_end = False  # nothing more can be read
        self._loop = loop
        self._sock = sock
        self._owner = owner
        self._closing = False
        self._goodbye: memoryview | None = None
        self._reading, self._writing = True, False

    def start(self) -> None:
        self._watch()
        self.pump()

    def _watch(self) -> None:
        if not self.closed:
            self._loop.watch(self._sock, READ * self._reading | WRITE * self._writing, self._ready)

    def _want(self, *, read: bool | None = None, write: bool | None = None) -> None:
        wanted = (self._reading if read is None else read, self._writing if write is None else write)
        if wanted != (self._reading, self._writing):
            self._reading, self._writing = wanted
            self._watch()

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self.pump()
        if mask & READ and not self.closed:
            self._read()

    # --- writing

    @abstractmethod
    def _outgoing(self) -> list[memoryview]:
        """What may be written now, in order."""

    @abstractmethod
    def _sent(self, nbytes: int) -> None: ...

    @property
    @abstractmethod
    def unsent(self) -> int:
        """Bytes that wait, injected delays included."""

    @property
    @abstractmethod
    def _next_sequence(self) -> int: ...

    def pump(self) -> None:
        """Writes what the socket takes."""
        if self.closed or self.finished_writing:
            return
        for _ in range(_ROUNDS):
            views = self._outgoing()
            if not views:
                break
            try:
                nbytes = self._sock.sendmsg(views)
            except BlockingIOError:
                self._want(write=True)
                return
            except OSError as error:
                self._broken(_words(error))
                return
            self._sent(nbytes)
        else:
            self._want(write=True)
            return
        self._want(write=False)
        if self._closing and not self.unsent:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._goodbye is None:
            self._goodbye = memoryview(Header(Kind.GOODBYE, self._next_sequence).pack())
        try:
            self._goodbye = self._goodbye[self._sock.send(self._goodbye) :]
            if not self._goodbye:
                self.finished_writing = True
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._want(write=True)
        except OSError as error:
            self._broken(_words(error))
        else:
            if self.finished_writing:
                self._owner.finished(self)

    # --- reading

    @abstractmethod
    def _receive(self) -> int | None:
        """Reads once and handles what is complete. 0: end of stream; None: no room."""

    def _read(self) -> bool:
        """One read; True if there may be more."""
        try:
            nbytes = len(self._sock.recv(_READ_BYTES)) if self._closing else self._receive()
        except BlockingIOError:
            return False
        except OSError as error:
            self.at_end = True
            self._broken(_words(error))
            return False
        except MalformedFrame as error:
            self.at_end = True
            self._want(read=False, write=False)
            self._loop.post(functools.partial(self._owner.malformed, self, error))
            return False
        if nbytes == 0:
            self.at_end = True
            self._broken("its connection ended without goodbye")
        return bool(nbytes)

    def drain(self) -> None:
        """Reads what the kernel still holds, as far as there is room for it."""
        while not (self.closed or self.at_end or self._closing) and self._read():
            pass

    def _broken(self, reason: str) -> None:
        """Tells the owner from the loop, not from here: it may drain and close this very stream."""
        self._want(read=False, write=self._writing and self.at_end)
        self._loop.post(functools.partial(self._owner.ended, self, reason))

    def begin_close(self) -> None:
        """Sends what waits, then goodbye; what still comes is thrown away."""
        if self.closed or self._closing:
            return
        self._closing = True
        self._want(read=not self.at_end)
        self.pump()

    def close(self) -> None:
        if not self.closed:
            self._loop.watch(self._sock, 0, self._ready)
            self.closed = True
            self._sock.close()


class DataStream(Stream):
    """Moves bytes between a socket and the rings of a send lane and a receive lane."""

    def __init__(
        self, loop: Loop, sock: socket.socket, owner: Owner, name: str, outbound: SendLane, inbound: RecvLane
    ) -> None:
        super().__init__(loop, sock, owner, name)
        self._out = outbound
        self.inbound = inbound
        self._alarm = 0.0  # when the timer for held frames rings
        self._limit = min(inbound.ring.capacity, inbound.config.max_message_mib << 20)
        self._header: Header | None = None
        self._frame_at = 0  # where in the ring the frame starts that is being received
        self._unparsed = 0
        self._resumed = float("-inf")  # when reading went on after the ring had been full
        self._sequence = 0
        outbound.wake = lambda: loop.post(self.pump)
        inbound.wake = lambda: loop.post(self._resume)

    @property
    def unsent(self) -> int:
        return self._out.ring.used if self._out.queue else 0

    @property
    def _next_sequence(self) -> int:
        return self._out.sequence

    def _outgoing(self) -> list[memoryview]:
        views: list[memoryview] = []
        now = self._loop.clock()
        for index in range(min(_BATCH, len(self._out.queue))):
            frame = self._out.queue[index]
            if frame.due > now:
                if self._alarm <= now:
                    self._alarm = frame.due
                    self._loop.call_at(frame.due, self.pump)
                break
            views += self._out.ring.slices(frame.offset + frame.done, frame.total - frame.done)
        return views

    def _sent(self, nbytes: int) -> None:
        self._out.sent(nbytes)

    def _receive(self) -> int | None:
        ring = self.inbound.ring
        window = ring.window()
        if not window:
            # said before looking again, so that a release in between is not missed
            self.inbound.paused = True
            window = ring.window()
            if not window:
                self._want(read=False)
                self.inbound.on_stuck()
                return None
            self.inbound.paused = False
        if not self._unparsed:
            self._frame_at = ring.place()
        nbytes = self._sock.recv_into(window)
        ring.commit(nbytes)
        self._unparsed += nbytes
        self._parse(self._loop.clock())
        return nbytes

    def _resume(self) -> None:
        if self.inbound.paused and not self.closed:
            self.inbound.paused = False
            self._resumed = self._loop.clock()
            self._want(read=True)

    def _parse(self, now: float) -> None:
        ring = self.inbound.ring
        while self._unparsed >= HEADER_BYTES:
            if self._header is None:
                raw = ring.read(self._frame_at, HEADER_BYTES)
                self._header = frames.parse_header(raw, sequence=self._sequence, limit=self._limit)
            header = self._header
            if self._unparsed < header.total:
                return
            self._header = None
            self._sequence += 1
            offset = self._frame_at
            self._frame_at = (offset + header.total) % ring.capacity
            self._unparsed -= header.total
            if header.kind == Kind.DATA:
                self._deliver(header, offset, now)
            elif header.kind == Kind.GOODBYE:
                self.inbound.skip(header.total)
                self.goodbye_heard = True
                self._owner.heard_goodbye(self)
            else:
                raise MalformedFrame(f"a {header.kind.name.lower()} frame came on a data connection")

    def _deliver(self, header: Header, offset: int, now: float) -> None:
        meta = self.inbound.ring.read(offset + HEADER_BYTES, header.meta_bytes)
        try:
            specs = understand(meta, header.tensors, header.payload_bytes)
        except BadLayout as error:
            raise MalformedFrame(f"{header.key}: {error}") from None
        delay = self._owner.delay(header.sent, now)
        # Sent before reading went on: it may have waited for this rank's consumer, in the kernels' buffers or, as TCP
        # pushed back, in the sender's ring. One sent later may still queue behind those, but they drain at the pace of
        # the link then: that is congestion, and counts.
        held = now - delay < self._resumed
        self.inbound.deliver(
            header.key, Arrived(header.total, offset, header.meta_bytes, specs, header.tag, delay * 1e3, held)
        )


class ServiceStream(Stream):
    """Pings and control messages, through small buffers of its own."""

    def __init__(self, loop: Loop, sock: socket.socket, owner: Owner, name: str) -> None:
        super().__init__(loop, sock, owner, name)
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._buffer = bytearray()
        self._sequence_in = self._sequence_out = 0

    @property
    def unsent(self) -> int:
        return self._queued_bytes

    @property
    def _next_sequence(self) -> int:
        return self._sequence_out

    def _outgoing(self) -> list[memoryview]:
        return [self._queue[index] for index in range(min(_BATCH, len(self._queue)))]

    def _sent(self, nbytes: int) -> None:
        self._queued_bytes -= nbytes
        while nbytes:
            head = self._queue[0]
            if nbytes < len(head):
                self._queue[0] = head[nbytes:]
                return
            nbytes -= len(head)
            self._queue.popleft()

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        if self.closed or self._closing:
            return
        header = Header(kind, self._sequence_out, self._loop.clock(), payload_bytes=len(payload))
        self._sequence_out += 1
        frame = memoryview(header.pack() + payload)
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        self.pump()

    def ping(self) -> None:
        self._send(Kind.PING)

    def send_control(self, data: bytes) -> None:
        self._send(Kind.CONTROL, data)

    def _receive(self) -> int | None:
        data = self._sock.recv(_READ_BYTES)
        now = self._loop.clock()
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= HEADER_BYTES:
            raw = bytes(self._buffer[at : at + HEADER_BYTES])
            header = frames.parse_header(raw, sequence=self._sequence_in, limit=HEADER_BYTES + frames.MAX_CONTROL_BYTES)
            if len(self._buffer) - at < header.total:
                break
            self._sequence_in += 1
            body = bytes(self._buffer[at + HEADER_BYTES : at + header.total])
            at += header.total
            self._handle(header, body, now)
        del self._buffer[:at]
        return len(data)

    def _handle(self, header: Header, body: bytes, now: float) -> None:
        if header.kind == Kind.PING:
            self._send(Kind.PONG, TIMES.pack(header.sent, now))
        elif header.kind == Kind.PONG and len(body) == TIMES.size:
            sent, remote_received = TIMES.unpack(body)
            self._owner.ping_answered(sent, remote_received, header.sent, now)
        elif header.kind == Kind.CONTROL:
            self._owner.control(frames.decode_control(body))
        elif header.kind == Kind.GOODBYE:
            self.goodbye_heard = True
            self._owner.heard_goodbye(self)
        else:
            raise MalformedFrame(
                f"a {header.kind.name.lower()} frame of {header.total} bytes came on a service connection"
            )
