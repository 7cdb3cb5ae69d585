"""What a rail is: one way for frames to travel to one peer.

A rail carries frames in order and loses none, until it fails; it may stall, be slow, or damage bytes of a body on their
way. It knows nothing of messages, retries or other rails: those are the link's (`proxy/link.py`), which is told of
everything through `Sink`. All calls happen on the proxy's loop; none blocks.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptra_plugin.transport.proxy.wire import FrameHeader


class RailKind(enum.IntEnum):
    """In order of preference."""

    SHM = 0
    RDMA = 1
    TCP = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(slots=True)
class Frame:
    """A frame on its way out. `body` has `header.body_bytes` bytes in all; those of a segment are windows into the
    sender's ring, at offset `(header.message + header.at) % capacity` and, around its end, 0, and stay untouched until
    the receiver has acknowledged the frame."""

    header: FrameHeader
    body: Sequence[memoryview | bytes] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that the link counts as under way: those of the segment, also where only a reference travels."""
        return self.header.length


class Sink(Protocol):
    """Who hears of a rail: the link to the peer."""

    limit: int
    """Longest message (bytes), for `wire.parse`."""
    lanes: int
    """Lanes per direction, for `wire.parse`."""

    def place(self, rail: Rail, header: FrameHeader) -> list[memoryview] | None:
        """Where the body of a segment goes (`header.length` bytes in one or two windows of the receive ring); None: it has
        come before and is to be thrown away. Until `arrived`, `failed` or `Rail.discard` the room is not used for anything
        else. Raises MalformedFrame."""

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        """A whole frame has come. `body`: of a frame that is no segment; a segment's bytes lie where `place` said, or, if it
        said None, nowhere. Raises MalformedFrame."""

    def failed(self, rail: Rail, reason: str) -> None:
        """The rail is unusable from now on, and closed. Never called from within `submit` or `close`."""


class Rail(ABC):
    """One connection, or pair of queues, to a peer."""

    kind: RailKind
    name: str
    """Unique among the rails to a peer and the same on both ends: `tcp0`, `rdma1`, `shm`."""
    by_reference = False
    """The peer reads the sender's ring itself."""
    closed = False
    garbled = False
    """It has ended because what came was no frame."""
    damages = False
    """What it carries may arrive damaged although the connection stands: segments need checksums, whatever is configured."""

    def __init__(self, kind: RailKind, name: str, sink: Sink) -> None:
        self.kind = kind
        self.name = name
        self.sink = sink

    @abstractmethod
    def submit(self, frame: Frame) -> None:
        """Takes a frame; returns at once. After `close`, or a failure that the sink has not heard of yet, it is dropped."""

    @property
    @abstractmethod
    def backlog(self) -> int:
        """Bytes submitted that have not left this process, headers included."""

    def flush(self) -> None:  # noqa: B027  not every rail gathers
        """What was submitted leaves now: the link calls it at the end of each turn. A rail may have sent it before."""

    def discard(self) -> None:  # noqa: B027  nor is in the middle of something
        """The segment that is on its way in comes another way: the rest of it is thrown away, and the room that `place` gave
        is let go of. `arrived` follows at its end all the same. Only a rail that calls `place` before all has come can be
        in the middle of a segment."""

    @abstractmethod
    def close(self) -> None:
        """Gives back all resources at once; nothing more is heard of it. Idempotent."""

    def _report(self, reason: str) -> None:
        """Tells the link that it has failed; from the loop, as the link may be in the middle of using it."""
        if not self.closed:
            self.close()
            self.sink.failed(self, reason)

    def describe(self) -> str:
        """Its two ends, in words for logs."""
        return self.name
