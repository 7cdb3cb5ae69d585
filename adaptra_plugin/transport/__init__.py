"""The delegated data plane: bytes leave the compute path at once and travel by a proxy.

`Endpoint` (one per rank) gives a `Channel` per neighbour; `Channel.send` and `Channel.recv` return tickets. Names are
imported when they are first used: the proxy's process uses parts of this package and loads neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptra_plugin.transport.bind import local_address_towards
    from adaptra_plugin.transport.channel import Channel
    from adaptra_plugin.transport.endpoint import Endpoint
    from adaptra_plugin.transport.message import Message
    from adaptra_plugin.transport.tickets import RecvTicket, Ticket
    from adaptra_plugin.transport.types import Address, Card, Direction, Key, PeerInfo

__all__ = [
    "Address",
    "Card",
    "Channel",
    "Direction",
    "Endpoint",
    "Key",
    "Message",
    "PeerInfo",
    "RecvTicket",
    "Ticket",
    "local_address_towards",
]

_HOMES = {
    "Address": "types",
    "Card": "types",
    "Channel": "channel",
    "Direction": "types",
    "Endpoint": "endpoint",
    "Key": "types",
    "Message": "message",
    "PeerInfo": "types",
    "RecvTicket": "tickets",
    "Ticket": "tickets",
    "local_address_towards": "bind",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
