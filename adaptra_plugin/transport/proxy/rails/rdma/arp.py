"""Whether the kernel knows the way to an address: who on the wire takes what goes there (ARP, or neighbour discovery).

An RDMA queue pair over Ethernet is connected by a call that waits for this answer, up to a second if nobody gives it, with
the interpreter locked: all other rails would stand still with it. So the question is asked before, and the call made after.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator

import psutil

from adaptra_plugin.backoff import Backoff
from adaptra_plugin.transport.proxy.loop import Loop, Timer

_LOOK_S = 0.002
_LONGEST_LOOK_S = 0.1
_ASK_S = 0.5
_DISCARD = 9  # a port where nobody listens: only the question that comes before matters
# linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h
_HEADER, _ROUTE, _NEIGHBOUR = map(struct.Struct, ("=IHHII", "=BBBBBBBBI", "=BxxxiHBB"))
_ATTRIBUTE, _INDEX, _FAMILY, _CODE = map(struct.Struct, ("=HH", "=I", "=H", "=i"))
_REQUEST, _ERROR = 1, 2
_GET_ROUTE, _GET_NEIGHBOUR = 26, 30
_DST, _SRC, _OIF, _GATEWAY, _VIA = 1, 2, 4, 5, 18
_UNICAST = 1
_VALID = 0xDE  # reachable, stale, delayed, probed, needless or permanent

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Unanswerable(Exception):
    """This kernel, or what confines the process, does not tell."""


class ArpQuery:
    """Finds the way from `source` on `interface` to `target`, and looks until it is known. Never raises.

    What this kernel does not tell counts as known, and so do link-local addresses, which may need no such answer.
    """

    def __init__(self, loop: Loop, interface: str | None, source: str, target: str) -> None:
        self._loop = loop
        self._text = f"nobody has answered for {target} on {interface} (ARP or neighbour discovery)"
        self._then: Callable[[], None] | None = None
        self._interface: str | None = None  # None: nobody needs to be asked
        self._timer: Timer | None = None
        self._pauses = Backoff(_LOOK_S, _LONGEST_LOOK_S)
        self._asked = float("-inf")
        self.known = True
        try:
            self._from, self._to = ipaddress.ip_address(source), ipaddress.ip_address(target)
        except ValueError:
            return
        link_local = self._to.version == 6 and self._to.is_link_local
        # the interface of that name may be another one, if the device belongs to another network namespace
        if interface is None or link_local or self._from.version != self._to.version or source not in _own(interface):
            return
        self._interface = interface
        self.known = False
        self._look()

    def __str__(self) -> str:
        """What is wrong while it is not known."""
        return self._text

    def when_known(self, then: Callable[[], None]) -> None:
        """Calls `then`, now or from the loop, unless the way is closed before."""
        self._then = then
        if self._interface is None:
            then()
        elif self.known:
            self._look()  # it may have been forgotten meanwhile

    def _look(self) -> None:
        assert self._interface is not None
        self._timer = None
        try:
            self.known = is_known(self._from, self._to, socket.if_nametoindex(self._interface))
        except Unanswerable:
            self.known = True
        except OSError:
            self.known = False  # the interface has gone
        if not self.known:
            if self._loop.clock() - self._asked >= _ASK_S:
                self._asked = self._loop.clock()
                self._ask()
            self._timer = self._loop.call_later(self._pauses.next(), self._look)
        elif self._then is not None:
            then, self._then = self._then, None
            then()

    def _ask(self) -> None:
        """Sends something, so that the kernel has to find out."""
        family = socket.AF_INET if self._to.version == 4 else socket.AF_INET6
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # not everybody may; routes mostly lead there anyway
                device = (self._interface or "").encode() + b"\0"
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
            sock.bind((str(self._from), 0))
            sock.sendto(b"", (str(self._to), _DISCARD))

    def close(self) -> None:
        """Idempotent."""
        self._then = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _own(interface: str) -> set[str]:
    """The addresses of an interface."""
    try:
        return {found.address for found in psutil.net_if_addrs().get(interface, ())}
    except OSError:  # no descriptor is left, for one
        return set()


def is_known(source: Address, target: Address, interface: int) -> bool:
    """Whether a packet through the interface of that index could leave at once. Raises Unanswerable."""
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    # the first hop may be a router
    bits = target.max_prefixlen
    named = ((_DST, target.packed), (_SRC, source.packed), (_OIF, _INDEX.pack(interface)))
    request = _ROUTE.pack(family, bits, bits, 0, 0, 0, 0, 0, 0) + b"".join(_attribute(*one) for one in named)
    answer = _asked(_GET_ROUTE, request)
    if answer is None:
        return False  # the link may be down
    if _ROUTE.unpack_from(answer)[7] != _UNICAST:
        return True  # an address of this host
    found = dict(_attributes(answer[_ROUTE.size :]))
    hop = found.get(_GATEWAY, target.packed)
    if (via := found.get(_VIA)) is not None:  # a router of the other family
        family, hop = _FAMILY.unpack_from(via)[0], via[_FAMILY.size :]
    (index,) = _INDEX.unpack(found.get(_OIF, _INDEX.pack(interface)))
    answer = _asked(_GET_NEIGHBOUR, _NEIGHBOUR.pack(family, index, 0, 0, 0) + _attribute(_DST, hop))
    return answer is not None and bool(_NEIGHBOUR.unpack_from(answer)[2] & _VALID)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _asked(kind: int, request: bytes) -> bytes | None:
    """What the kernel answers, without the header; None: it knows none. Raises Unanswerable."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.setblocking(False)  # it has answered when the question is sent
            sock.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST, 1, 0) + request)
            answer = sock.recv(1 << 16)
        length, what, *_ = _HEADER.unpack_from(answer)
        if what == _ERROR:
            code = -_CODE.unpack_from(answer, _HEADER.size)[0]
            if code in (errno.ENOENT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENODEV):
                return None
            raise Unanswerable(os.strerror(code))
        return answer[_HEADER.size : length]
    except (OSError, struct.error) as error:
        raise Unanswerable(str(error)) from None
