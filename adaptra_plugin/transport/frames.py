"""How a message lies in a ring: `header | description of the tensors | payload`, every block padded to 64 bytes.

A long payload may come in several *parts*, each with a header of its own, in their order: what is copied to, and from, a
device travels while the rest is still being copied. Only the first part has the description.

Everything is little-endian and checked before a byte of the payload is touched. No pickle anywhere.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.tensors import ALIGNMENT, MAX_META_BYTES, MAX_TENSORS
from adaptra_plugin.transport.types import Direction, Key

MAGIC = b"ADm3"
# magic, direction, reserved, tensors, step, stage, microbatch, tag, meta bytes, reserved, payload bytes, at, rest
_HEADER = struct.Struct("<4sBBHqiiqIIQQQ")
HEADER_BYTES = _HEADER.size


class MalformedMessage(TransportError):
    """An authenticated peer sent something that is no message."""


class MessageHeader(NamedTuple):
    """`payload_bytes`: of this part; so many bytes of the payload are in the parts before (`at`) and after it (`rest`)."""

    key: Key
    tag: int
    tensors: int
    meta_bytes: int
    payload_bytes: int
    at: int = 0
    rest: int = 0

    @property
    def whole(self) -> int:
        """Payload of all parts (bytes)."""
        return self.at + self.payload_bytes + self.rest

    @property
    def total(self) -> int:
        return HEADER_BYTES + self.meta_bytes + self.payload_bytes

    def pack(self) -> bytes:
        """Raises TransportError when a number does not fit its field."""
        key = self.key
        try:
            return _HEADER.pack(
                *(MAGIC, key.direction, 0, self.tensors, key.step_id, key.stage, key.microbatch, self.tag),
                *(self.meta_bytes, 0, self.payload_bytes, self.at, self.rest),
            )
        except struct.error as error:
            raise TransportError(f"{key} with tag {self.tag} cannot be sent: a number is too large ({error})") from None


def split(key: Key, tag: int, tensors: int, meta_bytes: int, payload_bytes: int, step: int) -> list[MessageHeader]:
    """The parts of a message, of `step` bytes of payload (a multiple of 64) and the last one of what is left."""
    found = []
    for at in range(0, max(payload_bytes, 1), step):
        length = min(step, payload_bytes - at)
        described = (tensors, meta_bytes) if at == 0 else (0, 0)
        found.append(MessageHeader(key, tag, *described, length, at, payload_bytes - at - length))
    return found


def parse_header(raw: bytes, *, direction: Direction, total: int, limit: int) -> MessageHeader:
    """Checks and unpacks the header of a message, or part of one, of `total` bytes that came on a lane of `direction`.

    `limit`: payload of all parts (bytes).

    Raises:
        MalformedMessage: says which field is wrong, with the numbers.
    """
    magic, code, _, tensors, step_id, stage, microbatch, tag, meta, _, payload, at, rest = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise MalformedMessage(f"a message starts with {magic.hex()} instead of {MAGIC.hex()}")
    if code != direction:
        raise MalformedMessage(f"a message of direction {code} came among those of direction {int(direction)}")
    header = MessageHeader(Key(step_id, direction, stage, microbatch), tag, tensors, meta, payload, at, rest)
    if meta > MAX_META_BYTES or meta % ALIGNMENT or header.total != total:
        raise MalformedMessage(f"a message of {total} bytes announces {HEADER_BYTES} + {meta} + {payload} bytes")
    if tensors > MAX_TENSORS:
        raise MalformedMessage(f"a message announces {tensors} tensors; at most {MAX_TENSORS} are accepted")
    if (
        header.whole > limit
        or at % ALIGNMENT
        or (rest and (not payload or payload % ALIGNMENT))
        or (at and (tensors or meta))
    ):
        raise MalformedMessage(
            f"a part of {payload} bytes behind {at} and before {rest} is announced; at most {limit} are accepted"
        )
    return header
