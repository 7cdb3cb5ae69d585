"""The wire format after the handshake: a fixed header, then what it announces.

Everything is little-endian and length-checked before a byte of the body is touched. No pickle anywhere; JSON only in
control frames. A data frame is `header | description of the tensors | payload`, every part padded to 64 bytes.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.tensors import MAX_META_BYTES, MAX_TENSORS
from adaptra_plugin.transport.types import Direction, Key

MAGIC = b"ADf1"
# magic, kind, direction, tensors, epoch, stage, microbatch, tag, sent, meta bytes, reserved, payload bytes, sequence
_HEADER = struct.Struct("<4sBBHqiiqdIIQQ")
HEADER_BYTES = _HEADER.size
TIMES = struct.Struct("<dd")  # of a pong: when the ping was sent (pinger's clock), when it came (answerer's clock)
MAX_CONTROL_BYTES = 4 << 20
"""Longest control message (bytes of JSON)."""
MAX_CONTROL_BACKLOG = 64 << 20
"""Control messages that may wait for one peer (bytes); one that reads nothing must not fill this rank's memory."""


class Kind(enum.IntEnum):
    DATA = 1
    PING = 2
    PONG = 3
    CONTROL = 4
    GOODBYE = 5


class MalformedFrame(TransportError):
    """An authenticated peer sent something that is no frame."""


@dataclass(frozen=True, slots=True)
class Header:
    """`sent` is the sender's clock (s): when a data frame lay whole in its ring, when the answer left for a pong."""

    kind: Kind
    sequence: int
    sent: float = 0.0
    meta_bytes: int = 0
    payload_bytes: int = 0
    direction: Direction = Direction.ACTIVATION
    tensors: int = 0
    epoch: int = 0
    stage: int = 0
    microbatch: int = 0
    tag: int = 0

    @property
    def total(self) -> int:
        return HEADER_BYTES + self.meta_bytes + self.payload_bytes

    @property
    def key(self) -> Key:
        return Key(self.epoch, self.direction, self.stage, self.microbatch)

    def pack(self) -> bytes:
        """Raises TransportError when a number does not fit its field."""
        try:
            return _HEADER.pack(
                MAGIC,
                self.kind,
                self.direction,
                self.tensors,
                self.epoch,
                self.stage,
                self.microbatch,
                self.tag,
                self.sent,
                self.meta_bytes,
                0,
                self.payload_bytes,
                self.sequence,
            )
        except struct.error as error:
            raise TransportError(
                f"{self.key} with tag {self.tag} cannot be sent: a number is too large ({error})"
            ) from None


def parse_header(raw: bytes, *, sequence: int, limit: int) -> Header:
    """Checks and unpacks a header; `limit` is the longest frame that this connection may carry (bytes).

    Raises:
        MalformedFrame: says which field is wrong, with the numbers.
    """
    magic, kind, direction, tensors, epoch, stage, microbatch, tag, sent, meta, _, payload, number = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise MalformedFrame(f"a frame starts with {magic.hex()} instead of {MAGIC.hex()}")
    try:
        header = Header(
            Kind(kind), number, sent, meta, payload, Direction(direction), tensors, epoch, stage, microbatch, tag
        )
    except ValueError as error:
        raise MalformedFrame(f"a frame has an unknown kind or direction: {error}") from None
    if number != sequence:
        raise MalformedFrame(f"frame number {number} came where {sequence} was due")
    if meta > MAX_META_BYTES or header.total > limit:
        raise MalformedFrame(
            f"a {header.kind.name.lower()} frame announces {meta} + {payload} bytes; at most {limit} are accepted here"
        )
    if tensors > MAX_TENSORS:
        raise MalformedFrame(f"a frame announces {tensors} tensors; at most {MAX_TENSORS} are accepted")
    return header


def encode_control(message: dict[str, Any]) -> bytes:
    """JSON bytes of a control message.

    Raises:
        TransportError: if it is no JSON object, or longer than `MAX_CONTROL_BYTES`.
    """
    if not isinstance(message, dict):
        raise TransportError(f"a control message is a dict, not {type(message).__name__}")
    try:
        data = json.dumps(message, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TransportError(f"control message {sorted(map(str, message))} is not JSON: {error}") from None
    if len(data) > MAX_CONTROL_BYTES:
        raise TransportError(
            f"control message {sorted(map(str, message))} has {len(data)} bytes; at most {MAX_CONTROL_BYTES} fit"
        )
    return data


def decode_control(data: bytes) -> dict[str, Any]:
    """The inverse of `encode_control`; raises MalformedFrame."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedFrame(f"a control message of {len(data)} bytes is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise MalformedFrame(f"a control message is a {type(message).__name__} instead of an object")
    return message
