"""How the two ends of an RDMA rail share the receiver's memory: slots for small things, the landing for bodies. Pure.

Every SEND fills one *slot* that the receiver has posted: a prefix and at most a page of payload. Segments are written into the
*landing*, a ring of the receiver's memory: prefix, header and body, and the immediate of the write uses up a slot too. A
sender never uses more of either than is free, so nothing is ever sent that has nowhere to go; the receiver returns what it has emptied with
every slot that goes the other way, or, if none does, with a slot of its own.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from adaptra_plugin.transport.proxy.wire import MalformedFrame

# kind, more, payload bytes, sequence, slots emptied, landing emptied up to, position in the landing
_PREFIX = struct.Struct("<BBHIQQQ")
PREFIX_BYTES = _PREFIX.size
_SEQUENCES = 1 << 32
IMMEDIATES = 1 << 32
"""A write's immediate has 32 bits."""


class SlotKind(enum.IntEnum):
    CREDIT = 1
    """Nothing but the prefix."""
    FRAME = 2
    """A frame, or a piece of one."""
    SEGMENT = 3
    """The header of a frame that lies in the landing, its body behind it."""


@dataclass(slots=True)
class Prefix:
    """In front of every slot. `more`: the frame goes on in the next slot. `emptied`, `landed`: what the sender of this has
    emptied since the start: slots, and the landing up to this position. `at`: position in the landing of a segment's body."""

    kind: SlotKind
    length: int
    sequence: int
    emptied: int
    landed: int
    at: int = 0
    more: bool = False

    def pack(self) -> bytes:
        sequence = self.sequence % _SEQUENCES
        return _PREFIX.pack(self.kind, self.more, self.length, sequence, self.emptied, self.landed, self.at)


def parse_prefix(slot: memoryview, sequence: int) -> Prefix:
    """The prefix of a slot that has come, with `sequence` slots before it. Raises MalformedFrame."""
    if len(slot) < PREFIX_BYTES:
        raise MalformedFrame(f"a slot of {len(slot)} bytes came; a prefix has {PREFIX_BYTES}")
    kind, more, length, number, emptied, landed, at = _PREFIX.unpack_from(slot)
    if number != sequence % _SEQUENCES:
        raise MalformedFrame(f"slot {number} came where {sequence % _SEQUENCES} was due")
    if kind not in (1, 2, 3) or length != len(slot) - PREFIX_BYTES:
        raise MalformedFrame(f"a slot of kind {kind} announces {length} bytes and has {len(slot) - PREFIX_BYTES}")
    return Prefix(SlotKind(kind), length, number, emptied, landed, at, bool(more))


class Budget:
    """What this end may still send.

    The last slot is kept for returning credit, and is used only when there is much to return. So two ends that are both
    out of slots cannot wait for each other: whoever used the last one gave back a quarter with it.
    """

    def __init__(self, slots: int, landing: int) -> None:
        """Sizes at the other end: number of slots, bytes."""
        self.slots = slots
        self.landing = landing
        self.sent = 0
        """Slots since the start; the number of the next one."""
        self._emptied = 0
        self._filled = 0  # position in the landing
        self._landed = 0

    @property
    def free_slots(self) -> int:
        return self.slots - (self.sent - self._emptied)

    def place(self, nbytes: int) -> int | None:
        """Takes room for a body, in one piece; its position, or None if there is not enough now."""
        start = self._filled % self.landing
        skipped = self.landing - start if start + nbytes > self.landing else 0
        # what is skipped of an empty landing keeps nobody waiting: or a body of more than half of it might never fit
        oldest = self._landed if self._landed < self._filled else self._filled + skipped
        if self._filled + skipped + nbytes - oldest > self.landing:
            return None
        position = self._filled + skipped
        self._filled = position + nbytes
        return position

    def returned(self, prefix: Prefix) -> None:
        """The other end has emptied so much. Raises MalformedFrame if that was never filled."""
        if not (self._emptied <= prefix.emptied <= self.sent and self._landed <= prefix.landed <= self._filled):
            raise MalformedFrame(
                f"{prefix.emptied} slots and {prefix.landed} bytes are returned, {self.sent} and {self._filled} were sent"
            )
        self._emptied, self._landed = prefix.emptied, prefix.landed


class Debt:
    """What this end has emptied and may not have told yet."""

    def __init__(self, slots: int, landing: int) -> None:
        """Sizes at this end: number of slots, bytes."""
        self.landing = landing
        self.emptied = 0
        """Slots since the start; the number of the next one that comes."""
        self.landed = 0
        self._slots_due = max(1, slots // 4)
        self._bytes_due = max(1, landing // 4)
        self._told_emptied = 0
        self._told_landed = 0

    def position(self, immediate: int) -> int:
        """The position in the landing whose last 32 bits these are."""
        return self.landed + (immediate - self.landed) % IMMEDIATES

    def window(self, at: int, nbytes: int) -> tuple[int, int]:
        """(start, stop) offsets of a body in the landing. Raises MalformedFrame if it cannot lie there."""
        start = at % self.landing
        if not 0 < nbytes <= self.landing - start or not self.landed <= at <= self.landed + self.landing:
            raise MalformedFrame(f"a body of {nbytes} bytes at {at} is announced; the landing has {self.landing}")
        return start, start + nbytes

    @property
    def due(self) -> bool:
        """So much that it has to be told even if nothing else goes."""
        slots, nbytes = self.emptied - self._told_emptied, self.landed - self._told_landed
        return slots >= self._slots_due or nbytes >= self._bytes_due

    def told(self) -> tuple[int, int]:
        """(slots, position) for a prefix that leaves now."""
        self._told_emptied, self._told_landed = self.emptied, self.landed
        return self.emptied, self.landed
