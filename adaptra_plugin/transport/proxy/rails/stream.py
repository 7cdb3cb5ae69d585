"""Frames over a connected stream socket: TCP, or, by reference, a Unix socket between processes of one host."""

from __future__ import annotations

import functools
import itertools
import socket
from collections import deque
from collections.abc import Callable

from adaptra_plugin.transport.proxy.loop import READ, WRITE, Loop
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail, RailKind, Sink
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, FrameHeader, FrameKind, MalformedFrame, parse

_ROUNDS = 8
"""System calls for one rail before others get their turn."""
_PIECES = 64
"""Pieces handed over in one system call."""
_PIECE_BYTES = 8 << 20
_AT_ONCE = 128 << 10
"""Bytes that do not wait for the end of the turn."""
_SCRATCH = 64 << 10
"""Bytes read at a time where small frames are expected."""
_LOW_WATER = 512 << 10
"""A body that is longer wakes the proxy only when so much has come: fewer, larger copies."""
_CLOSED = "its connection was closed"


class StreamRail(Rail):
    """Takes over a non-blocking socket whose two ends have proved the job's secret."""

    def __init__(self, kind: RailKind, name: str, sink: Sink, loop: Loop, sock: socket.socket) -> None:
        super().__init__(kind, name, sink)
        self.by_reference = kind is RailKind.SHM
        self._loop = loop
        self._sock = sock
        self._out: deque[memoryview | bytes] = deque()
        self._backlog = 0
        self._writing = False
        self._broken: str | None = None
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._held = 0  # bytes of the scratch that are not used yet
        self._header: FrameHeader | None = None
        self._windows: deque[memoryview] = deque()  # where the rest of the body goes
        self._body = bytearray()
        self._waste = 0  # bytes of the body that are thrown away
        self._bulk = False  # the last frame was long: do not read far into the next one
        self._low = 1
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)  # only TLS holds bytes back
        self._reading = READ  # what to wait for in order to read
        loop.watch(sock, READ, self._ready)
        self._look_again()

    def describe(self) -> str:
        if self.kind is RailKind.SHM:
            return self.name
        try:
            here, there = self._sock.getsockname(), self._sock.getpeername()
        except OSError:
            return self.name
        return f"{self.name} ({here[0]}:{here[1]} - {there[0]}:{there[1]})"

    # --- writing

    def submit(self, frame: Frame) -> None:
        if self.closed or self._broken is not None:
            return
        length = 0
        self._out.append(frame.header.pack())
        for piece in frame.body:
            length += len(piece)
            self._out.append(piece)
        if frame.header.body_bytes != length:
            raise ValueError(f"a frame announces {frame.header.body_bytes} bytes and has {length}")
        self._backlog += HEADER_BYTES + length
        if self._backlog >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if self._out and not self._writing and self._broken is None:
            self._pump()

    @property
    def backlog(self) -> int:
        return self._backlog

    def _pump(self) -> None:
        for _ in range(_ROUNDS):
            if not self._out:
                break
            views: list[memoryview | bytes] = []
            room = _PIECE_BYTES
            for piece in itertools.islice(self._out, _PIECES):
                if len(piece) >= room:
                    views.append(memoryview(piece)[:room])
                    break
                views.append(piece)
                room -= len(piece)
            try:
                nbytes = self._sock.sendmsg(views)
            except BlockingIOError:
                self._watch(writing=True)
                return
            except OSError as error:
                self._fail(f"its connection broke ({error.strerror or error})")
                return
            self._backlog -= nbytes
            while nbytes:
                head = self._out[0]
                if nbytes < len(head):
                    self._out[0] = memoryview(head)[nbytes:]
                    break
                nbytes -= len(head)
                self._out.popleft()
        if self._out:
            self._watch(writing=True)
            return
        self._watch(writing=False)

    def _watch(self, *, writing: bool) -> None:
        if writing != self._writing and not self.closed and self._broken is None:
            self._writing = writing
            self._loop.watch(self._sock, self._reading | WRITE * writing, self._ready)

    def _ready(self, mask: int) -> None:
        if mask & WRITE and not self.closed:
            self._pump()
        if mask & self._reading and not self.closed and self._broken is None:
            self._read()

    def _look_again(self) -> None:
        """Bytes that TLS has decrypted already wait for no readiness of the socket, but for others' turns."""
        if self._pending is not None and not self.closed and self._pending():
            self._loop.post(lambda: None if self.closed or self._broken is not None else self._read())

    def _wait_for(self, events: int) -> None:
        if events != self._reading and not self.closed and self._broken is None:
            self._reading = events
            self._loop.watch(self._sock, events | WRITE * self._writing, self._ready)

    # --- reading

    def _read(self) -> None:
        try:
            for _ in range(_ROUNDS):
                if self.closed or not self._read_once():
                    break
            self._expect()
            self._wait_for(READ)
            self._look_again()
        except BlockingIOError as blocked:
            self._expect()
            self._wait_for(getattr(blocked, "events", READ))
        except OSError as error:
            self._fail(f"its connection broke ({error.strerror or error})")
        except MalformedFrame as error:
            self.garbled = True
            self._fail(f"what came is no frame: {error}")

    def _read_once(self) -> bool:
        """One system call; True if there may be more."""
        if self._header is None:
            wanted = self._scratch[self._held : max(HEADER_BYTES if self._bulk else _SCRATCH, self._held + 1)]
            nbytes = self._sock.recv_into(wanted)
            if nbytes:
                self._held += nbytes
                self._parse()
        elif self._waste:
            wanted = self._scratch[: self._waste]
            nbytes = self._sock.recv_into(wanted)
            self._waste -= nbytes
        else:
            wanted = self._windows[0][:_PIECE_BYTES]
            nbytes = self._sock.recv_into(wanted)
            self._filled(nbytes)
        if not nbytes:
            self._fail(_CLOSED)
            return False
        if self._header is not None and not (self._windows or self._waste):
            self._complete()
        return nbytes == len(wanted) or self._pending is not None  # TLS gives a record at a time

    def _filled(self, nbytes: int) -> None:
        window = self._windows.popleft()
        if nbytes < len(window):
            self._windows.appendleft(window[nbytes:])

    def _parse(self) -> None:
        """Takes frames out of the scratch; the rest of the last one, if it is long, is read to where it belongs."""
        scratch, sink, at = self._scratch, self.sink, 0
        while self._held - at >= HEADER_BYTES and not self.closed:
            header = parse(scratch, limit=sink.limit, lanes=sink.lanes, at=at)
            at += HEADER_BYTES
            length = header.body_bytes
            self._bulk = length > _SCRATCH
            if self._held - at < length:
                self._begin(header, length)
                self._spread(scratch[at : self._held])
                at = self._held
                break
            body = b""
            if header.kind is not FrameKind.SEGMENT:
                body = bytes(scratch[at : at + length])
            elif length and (windows := sink.place(self, header)) is not None:
                self._windows.extend(windows)
                self._spread(scratch[at : at + length])
            at += length
            sink.arrived(self, header, body)
        rest = self._held - at
        if rest and at:
            scratch[:rest] = bytes(scratch[at : self._held])
        self._held = rest

    def _begin(self, header: FrameHeader, length: int) -> None:
        """Of a frame, only the header has come, or not all of the body."""
        self._header = header
        if header.kind is not FrameKind.SEGMENT:
            self._body = bytearray(length)
            self._windows.append(memoryview(self._body))
        elif (windows := self.sink.place(self, header)) is not None:
            self._windows.extend(windows)
        else:
            self._waste = length

    def _spread(self, piece: memoryview) -> None:
        """What has come of a body goes where it belongs."""
        if self._waste:
            self._waste -= len(piece)
            return
        while len(piece):
            step = min(len(self._windows[0]), len(piece))
            self._windows[0][:step] = piece[:step]
            self._filled(step)
            piece = piece[step:]

    def _complete(self) -> None:
        header, body = self._header, bytes(self._body)
        assert header is not None
        self._header, self._body = None, bytearray()
        self.sink.arrived(self, header, body)

    def _expect(self) -> None:
        """Tells the kernel how much has to come before it is worth waking up."""
        rest = self._waste or sum(map(len, self._windows))
        low = min(rest, _LOW_WATER) if rest >= _LOW_WATER // 2 else 1
        if low != self._low and not self.closed and self.kind is RailKind.TCP and self._pending is None:
            self._low = low
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)

    def discard(self) -> None:
        self._waste += sum(map(len, self._windows))
        self._windows.clear()

    # --- the end

    def _fail(self, reason: str) -> None:
        """Tells the link from the loop, not from here: it may be in the middle of using this rail."""
        if self.closed or self._broken is not None:
            return
        self._broken = reason
        self._loop.watch(self._sock, 0, self._ready)
        self._loop.post(functools.partial(self._report, reason))

    def close(self) -> None:
        if not self.closed:
            self.flush()  # last words of this turn
            self.closed = True
            self._loop.watch(self._sock, 0, self._ready)
            self._sock.close()
            self._out.clear()
            self._windows.clear()
