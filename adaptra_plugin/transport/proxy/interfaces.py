"""Addresses of network interfaces."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from adaptra_plugin.errors import TransportError

_SIOCGIFADDR = 0x8915


def address_of(interface: str) -> str:
    """The IPv4 address of an interface given by name (`eth0`); an address is returned as it is.

    Raises:
        TransportError: there is no such interface, or it has no address.
    """
    try:
        return str(ipaddress.ip_address(interface))
    except ValueError:
        pass
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise TransportError(
            f"adaptra.transport.interfaces: {interface!r} has no IPv4 address ({error.strerror}); this host has {known}"
        ) from None
    return socket.inet_ntoa(answer[20:24])
