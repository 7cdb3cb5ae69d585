"""What proxies say to each other after the handshake: frames of one fixed header and a body.

Everything is little-endian; a header carries its own checksum and is checked against the limits before a byte of the
body is touched. No pickle; JSON only in CONTROL and RAIL bodies.

A message is a piece of a sender's ring, `[message, message + total)` in positions. It travels as segments, each of which
says to which message it belongs, so segments may come over different rails, and again after a rail has failed. The receiver
keeps them at the same positions of its own ring, the receive ring.
"""

from __future__ import annotations

import enum
import math
import struct
import zlib
from dataclasses import dataclass

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.types import Direction

MAGIC = b"AD3\n"
# magic, kind, flags, direction, lane, after, sequence, ack, message, total, at, length, floor, checksum, sent
_HEADER = struct.Struct("<4sBBBBIQQQQQQQQd")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size
MAX_BODY_BYTES = 4 << 20
"""Longest body that is no segment's (bytes)."""
MAX_NOTE_BYTES = 64 << 10
"""Longest body of a frame that is neither a segment's nor the endpoint's (bytes)."""
UNIT = 64
"""Messages begin at multiples of this (bytes)."""
POSITIONS = struct.Struct("<BBxxxxxxQ")  # direction, lane, message: an entry of a CONSUMED body
TIMES = struct.Struct("<dd")  # of a pong: when the ping was sent (pinger's clock), when it came (answerer's clock)


class FrameKind(enum.IntEnum):
    SEGMENT = 1
    """A piece of a message."""
    ACK = 2
    """Nothing but the acknowledgement that every header has. Not numbered."""
    CONSUMED = 3
    """The room of `message` in the ring is free again, and that of the messages of the body."""
    STUCK = 4
    """A producer waits for room in the ring of this lane (`total` 1), or no longer (0); `message` counts the changes."""
    CONTROL = 5
    """JSON for the endpoint; `message` numbers them."""
    PING = 6
    PONG = 7
    GOODBYE = 8
    """Nothing follows."""
    TAKEN = 10
    """The endpoint has taken all control messages up to number `message`."""
    RAIL = 9
    """JSON for the proxy: rails to open and to close."""
    NACK = 11
    """What the frame with number `message` of this rail carried has not been kept, because it came damaged: it is to go again.
    Comes before the acknowledgement of that number. Not numbered."""


class Flag:
    """Bits of `FrameHeader.flags`; plain numbers, because those of an enumeration are slow."""

    REFERENCE = 1
    """The bytes stay in the sender's ring, which the receiver has mapped: the frame has no body."""
    VERIFIED = 2
    """`checksum` is that of the body (xxh3, 64 bits). Always so for bodies that are no segment's."""


class MalformedFrame(TransportError):
    """An authenticated peer sent something that is no frame."""


@dataclass(slots=True)
class FrameHeader:
    """`sequence` numbers the frames of a connection that want an acknowledgement, from 1 without gaps; 0: none is wanted.
    `ack`: all frames up to this number have come the other way. `floor`: all messages of the lane before this position
    are done with. `sent`: when the message lay whole in the ring (sender's clock, s). `after`: how far in front of this
    message (in units of `UNIT` bytes) lies one that has to be delivered before it; 0: none. A ping's `message`: which
    connection it is to the pinger."""

    kind: FrameKind
    sequence: int = 0
    flags: int = 0
    direction: Direction = Direction.ACTIVATION
    lane: int = 0
    message: int = 0
    total: int = 0
    at: int = 0
    length: int = 0
    floor: int = 0
    checksum: int = 0
    sent: float = 0.0
    after: int = 0
    ack: int = 0

    @property
    def body_bytes(self) -> int:
        """Bytes that follow on the wire."""
        return 0 if self.kind == FrameKind.SEGMENT and self.flags & Flag.REFERENCE else self.length

    def pack(self) -> bytes:
        raw = _HEADER.pack(
            *(MAGIC, self.kind, self.flags, self.direction, self.lane, self.after, self.sequence, self.ack),
            *(self.message, self.total, self.at, self.length, self.floor, self.checksum, self.sent),
        )
        return raw + _CHECK.pack(zlib.crc32(raw))


_KINDS = {int(kind): kind for kind in FrameKind}  # a look into a table costs less than a call of the class
_DIRECTIONS = {int(direction): direction for direction in Direction}


def parse(raw: bytes | memoryview, *, limit: int, lanes: int, at: int = 0) -> FrameHeader:
    """Checks and unpacks the header that begins at `at`.

    Args:
        raw: `HEADER_BYTES` bytes from there on.
        limit: longest message that may be announced (bytes).
        lanes: number of lanes per direction.

    Raises:
        MalformedFrame: says which field is wrong, with the numbers.
    """
    (magic, code, flags, way, lane, after, sequence, ack, message, total, offset, length, floor, checksum, sent) = (
        _HEADER.unpack_from(raw, at)
    )
    if magic != MAGIC:
        raise MalformedFrame(f"a frame starts with {magic.hex()} instead of {MAGIC.hex()}")
    end = at + _HEADER.size
    if zlib.crc32(raw[at:end]) != _CHECK.unpack_from(raw, end)[0]:
        raise MalformedFrame("the checksum of a frame's header is wrong")
    kind, direction = _KINDS.get(code), _DIRECTIONS.get(way)
    if kind is None or direction is None:
        raise MalformedFrame(f"a frame has an unknown kind or direction: {code}, {way}")
    if lane >= lanes:
        raise MalformedFrame(f"a frame is for lane {lane}; there are {lanes}")
    if not math.isfinite(sent):
        raise MalformedFrame(f"a frame says that it was sent at {sent}")
    if kind is FrameKind.SEGMENT:
        if not 0 < total <= limit or length < 1 or offset + length > total:
            raise MalformedFrame(
                f"a segment announces bytes {offset} to {offset + length} of a message of {total}; "
                f"at most {limit} are accepted"
            )
        if message + total >= 1 << 63 or floor > message or message % UNIT:
            raise MalformedFrame(f"a segment announces the impossible position {message} with floor {floor}")
        if flags & Flag.REFERENCE and length != total:
            raise MalformedFrame(f"a reference is to {length} bytes of a message of {total}")
    elif length > (most := MAX_BODY_BYTES if kind is FrameKind.CONTROL else MAX_NOTE_BYTES):
        raise MalformedFrame(f"a {kind.name.lower()} frame announces {length} bytes; {most} may come")
    return FrameHeader(
        kind, sequence, flags, direction, lane, message, total, offset, length, floor, checksum, sent, after, ack
    )
