"""How a message lies in a ring: `header | description of the tensors | payload`, every part padded to 64 bytes.

Everything is little-endian and checked before a byte of the payload is touched. No pickle anywhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.tensors import ALIGNMENT, MAX_META_BYTES, MAX_TENSORS
from adaptra_plugin.transport.types import Direction, Key

MAGIC = b"ADm2"
# magic, direction, reserved, tensors, epoch, stage, microbatch, tag, meta bytes, reserved, payload bytes, reserved
_HEADER = struct.Struct("<4sBBHqiiqIIQ16x")
HEADER_BYTES = _HEADER.size


class MalformedMessage(TransportError):
    """An authenticated peer sent something that is no message."""


@dataclass(frozen=True, slots=True)
class Header:
    key: Key
    tag: int
    tensors: int
    meta_bytes: int
    payload_bytes: int

    @property
    def total(self) -> int:
        return HEADER_BYTES + self.meta_bytes + self.payload_bytes

    def pack(self) -> bytes:
        """Raises TransportError when a number does not fit its field."""
        key = self.key
        try:
            return _HEADER.pack(
                *(MAGIC, key.direction, 0, self.tensors, key.epoch, key.stage, key.microbatch, self.tag),
                *(self.meta_bytes, 0, self.payload_bytes),
            )
        except struct.error as error:
            raise TransportError(f"{key} with tag {self.tag} cannot be sent: a number is too large ({error})") from None


def parse_header(raw: bytes, *, direction: Direction, total: int) -> Header:
    """Checks and unpacks the header of a message of `total` bytes that came on a lane of `direction`.

    Raises:
        MalformedMessage: says which field is wrong, with the numbers.
    """
    magic, code, _, tensors, epoch, stage, microbatch, tag, meta, _, payload = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise MalformedMessage(f"a message starts with {magic.hex()} instead of {MAGIC.hex()}")
    if code != direction:
        raise MalformedMessage(f"a message of direction {code} came among those of direction {int(direction)}")
    header = Header(Key(epoch, direction, stage, microbatch), tag, tensors, meta, payload)
    if meta > MAX_META_BYTES or meta % ALIGNMENT or header.total != total:
        raise MalformedMessage(f"a message of {total} bytes announces {HEADER_BYTES} + {meta} + {payload} bytes")
    if tensors > MAX_TENSORS:
        raise MalformedMessage(f"a message announces {tensors} tensors; at most {MAX_TENSORS} are accepted")
    return header
