"""The delegated data plane: bytes leave the compute path at once and travel by a proxy.

`Endpoint` (one per rank) gives a `Channel` per neighbour; `Channel.send` and `Channel.recv` return tickets.
"""

from adaptra_plugin.transport.bind import local_address_towards
from adaptra_plugin.transport.channel import Channel
from adaptra_plugin.transport.endpoint import Endpoint
from adaptra_plugin.transport.tickets import RecvTicket, Ticket
from adaptra_plugin.transport.types import Address, Direction, Key, Message, PeerInfo

__all__ = [
    "Address",
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
