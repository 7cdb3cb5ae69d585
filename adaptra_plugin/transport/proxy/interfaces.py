"""Addresses of network interfaces."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from adaptra_plugin.errors import TransportError


def address_of(interface: str) -> str:
    """The IPv4 address of an interface given by name (`eth0`); an address is returned as it is.

    Raises:
        TransportError: there is no such interface, or it has no address.
    """
    try:
        return str(ipaddress.ip_address(interface))
    except ValueError:
        pass
    known = psutil.net_if_addrs()
    found = [entry.address for entry in known.get(interface, ()) if entry.family == socket.AF_INET]
    if not found:
        raise TransportError(
            f"adaptra.transport.interfaces: {interface!r} has no IPv4 address; this host has {', '.join(known)}"
        )
    return str(found[0])
