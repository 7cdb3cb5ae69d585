"""What this machine allows: transfers between two processes with nothing in them but copies, a bell, or a socket.

No protocol, no acknowledgements, no checksums, no Python per segment. What a transport that hands its bytes to somebody else
does at least:

    staged    sender copies into shared memory, receiver copies out: the bare form of the shared memory rail
    relayed   the same through a TCP connection that a thread at each end serves: the bare form of the TCP rail
    socket    the same connection without staging, as if the caller's own thread wrote the tensor into it: the least any
              TCP transport does, one whose `send` blocks included
"""

from __future__ import annotations

import mmap
import queue
import socket
import threading

import torch

from adaptra_plugin.transport.memory import memcpy

SLOTS = 2
DEADLINE_S = 120.0
PIECE = 1 << 20
"""Bytes a call into the socket."""


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """As the transport does it. Both contiguous, of one length, in host memory."""
    assert target.numel() == source.numel()
    memcpy(target.data_ptr(), source.data_ptr(), source.numel())


class HandshakeConnection:
    """What both processes inherit: `SLOTS` slots of shared memory (few: they stay in the caches), a bell, a TCP connection."""

    def __init__(self, largest: int) -> None:
        self.shared = mmap.mmap(-1, SLOTS * largest)
        self.bells = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as acceptor:
            self.ends = (socket.create_connection(acceptor.getsockname()), acceptor.accept()[0])
        for end in self.ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for end in (*self.ends, *self.bells):
            end.settimeout(DEADLINE_S)


class Bare:
    """One of the two processes: rank 0 sends, rank 1 receives into few buffers."""

    def __init__(self, rank: int, connection: HandshakeConnection, largest: int) -> None:
        self._sends = rank == 0
        self._connection = connection
        self._sock = connection.ends[rank]
        self._bell = connection.bells[rank]
        for ends in (connection.ends, connection.bells):
            ends[1 - rank].close()  # or the end of the other process would not be seen
        self._ring = mmap.mmap(-1, SLOTS * largest)
        self._targets: dict[int, torch.Tensor] = {}

    def target(self, data: torch.Tensor) -> torch.Tensor:
        """A buffer of that size that has been written to before, in huge pages where the system has them."""
        size = data.numel()
        if size not in self._targets:
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area.madvise(mmap.MADV_HUGEPAGE)
            self._targets[size] = torch.frombuffer(area, dtype=torch.uint8).fill_(1)
        return self._targets[size]

    @staticmethod
    def _slot(area: mmap.mmap, number: int, size: int) -> torch.Tensor:
        start = number % SLOTS * size
        return torch.frombuffer(area, dtype=torch.uint8, count=size, offset=start)

    def staged(self, data: torch.Tensor, count: int) -> None:
        size, shared = data.numel(), self._connection.shared
        if self._sends:
            for number in range(count):
                if number >= SLOTS:
                    self._wait()
                copy(self._slot(shared, number, size), data)
                self._bell.send(b"x")
            for _ in range(min(count, SLOTS)):
                self._wait()
        else:
            for number in range(count):
                self._wait()
                copy(self.target(data), self._slot(shared, number, size))
                self._bell.send(b"x")

    def _wait(self) -> None:
        if not self._bell.recv(1):
            raise ConnectionError("the other process has ended")

    def relayed(self, data: torch.Tensor, count: int) -> None:
        size, ring = data.numel(), memoryview(self._ring)
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        full: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(SLOTS):
            free.put(slot)

        def relay() -> None:
            for _ in range(count):
                slot = (full if self._sends else free).get(timeout=DEADLINE_S)
                self._move(ring[slot * size : (slot + 1) * size])
                (free if self._sends else full).put(slot)

        thread = threading.Thread(target=relay)
        thread.start()
        for _ in range(count):
            if self._sends:
                slot = free.get(timeout=DEADLINE_S)
                copy(self._slot(self._ring, slot, size), data)
                full.put(slot)
            else:
                slot = full.get(timeout=DEADLINE_S)
                copy(self.target(data), self._slot(self._ring, slot, size))
                free.put(slot)
        thread.join()
        self._answer()

    def socket(self, data: torch.Tensor, count: int) -> None:
        view = memoryview((data if self._sends else self.target(data)).numpy())
        for _ in range(count):
            self._move(view)
        self._answer()

    def _move(self, view: memoryview) -> None:
        """All of it through the socket, one way or the other."""
        done = 0
        while done < len(view):
            piece = view[done : done + PIECE]
            moved = self._sock.send(piece) if self._sends else self._sock.recv_into(piece)
            if not moved:
                raise ConnectionError("the other process has ended")
            done += moved

    def _answer(self) -> None:
        if self._sends:
            self._sock.recv(1)
        else:
            self._sock.send(b"x")
