"""What the two ends of an RDMA rail tell each other before it stands: plain values, checked before a card sees them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.queue_memory import SLOT_BYTES, QueueMemory
from adaptra_plugin.transport.proxy.rails.rdma.verbs import VerbsError

VERSION = 2
_LIMITS: dict[str, tuple[int, int]] = {  # field -> smallest and largest value
    "version": (VERSION, VERSION),
    "number": (0, (1 << 24) - 1),
    "psn": (0, (1 << 24) - 1),
    "lid": (0, (1 << 16) - 1),
    "mtu": (256, 4096),
    "slots": (4, 1 << 16),
    "slot_bytes": (512, 1 << 16),
    "landing": (SLOT_BYTES, 1 << 31),  # positions in it are told by their last 32 bits
    "address": (1, (1 << 64) - 1),
    "key": (0, (1 << 32) - 1),
}


def offer_of(nic: Nic, memory: QueueMemory) -> dict[str, Any]:
    """What the other end needs to connect."""
    return {
        "version": VERSION,
        "name": nic.name,
        "number": memory.pair.number,
        "psn": memory.pair.psn,
        "gid": nic.gid.raw if nic.gid else "",
        "lid": nic.port.lid,
        "mtu": nic.port.mtu,
        "slots": memory.slots,
        "slot_bytes": SLOT_BYTES,
        "landing": memory.landing_region.nbytes,
        "address": memory.landing_region.address,
        "key": memory.landing_region.rkey,
    }


def check(offer: Mapping[str, Any], rail: str, nic: Nic) -> None:
    """Raises VerbsError for one that makes no sense, or that this port cannot accept."""
    for field, (least, most) in _LIMITS.items():
        value = offer.get(field)
        if type(value) is not int or not least <= value <= most:
            raise VerbsError(f"the offer of rail {rail} has {field} {value!r}; {least} to {most} is possible")
    gid = offer.get("gid")
    if not isinstance(gid, str) or bool(gid) != (nic.gid is not None):
        raise VerbsError(f"the offer of rail {rail} has the address {gid!r}, which {nic.name} cannot reach")
    try:
        if gid:
            ipaddress.IPv6Address(gid)
    except ValueError:
        raise VerbsError(f"the offer of rail {rail} has the address {gid!r:.80}, which is none") from None
