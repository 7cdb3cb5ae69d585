"""The delegated data plane: bytes leave the compute path at once and travel by a proxy.

`Endpoint` (one per rank) gives a `Channel` per neighbour; `Channel.send` and `Channel.recv` return works. Names are
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
    from adaptra_plugin.transport.types import Address, Direction, EndpointInfo, Key, PeerInfo
    from adaptra_plugin.transport.works import RecvWork, SendWork

__all__ = [
    "Address",
    "Channel",
    "Direction",
    "Endpoint",
    "EndpointInfo",
    "Key",
    "Message",
    "PeerInfo",
    "RecvWork",
    "SendWork",
    "local_address_towards",
]

_HOMES = {
    "Address": "types",
    "EndpointInfo": "types",
    "Channel": "channel",
    "Direction": "types",
    "Endpoint": "endpoint",
    "Key": "types",
    "Message": "message",
    "PeerInfo": "types",
    "RecvWork": "works",
    "SendWork": "works",
    "local_address_towards": "bind",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
