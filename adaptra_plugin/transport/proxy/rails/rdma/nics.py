"""The RDMA ports that a proxy uses: which there are, which of a peer's they reach, and what happens to them."""

from __future__ import annotations

import contextlib
import ipaddress
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.loop import READ, Descriptor, Loop, Timer
from adaptra_plugin.transport.proxy.rails.rdma import verbs
from adaptra_plugin.transport.proxy.rails.rdma.arp import ArpQuery
from adaptra_plugin.transport.proxy.rails.rdma.verbs import Device, Gid, Port, QueuePair, Region, VerbsError

RETIRED_S = 5.0
"""Until a queue pair that is out of service is destroyed (s)."""
MAX_RETIRED = 4
"""Those of one port that wait for it; beyond that the oldest one goes at once."""


class Nic:
    """A port of an open device, shared by all rails over it. Rings that are sent from are registered once."""

    def __init__(self, loop: Loop, device: str, number: int = 1, address: str | None = None) -> None:
        """`address`: which of the port's addresses to use; None: the best. Raises VerbsError."""
        self.loop = loop
        self.device = Device(device)
        try:
            self.port: Port = self.device.port(number)
            self.gid: Gid | None = self.port.gid(address) if self.port.gids or address else None
        except BaseException:
            self.device.close()
            raise
        self._rings: dict[Memfd, dict[int, Region | None]] = {}  # by extent; None: it was wanted, and could not be had
        self._listeners: list[Callable[[str], None]] = []
        self._retired: deque[tuple[Sequence[Any], Timer]] = deque()
        self._events: Descriptor | None = None
        if self.device.events_fd is not None:
            self._events = Descriptor(self.device.events_fd)
            loop.watch(self._events, READ, self._ready)

    @property
    def name(self) -> str:
        where = self.gid.address if self.gid else f"lid {self.port.lid}"
        return f"{self.device.name}/{self.port.number} {where}"

    def info(self) -> dict[str, Any]:
        """For `EndpointInfo.rdma`: what a peer has to know to choose between its ports."""
        return {
            "device": self.device.name,
            "port": self.port.number,
            "layer": self.port.link_layer,
            "kind": self.gid.kind if self.gid else "ib",
            "address": self.gid.address if self.gid else "",
        }

    def arp_query(self, info: Mapping[str, Any]) -> ArpQuery:
        """To a peer's port, of that card; the caller closes it."""
        gid = self.gid
        # on InfiniBand the subnet manager knows
        interface = gid.interface if gid is not None and self.port.link_layer == "ethernet" else None
        return ArpQuery(self.loop, interface, gid.address if gid is not None else "", str(info.get("address", "")))

    def ring(self, memfd: Memfd) -> None:
        """Registers a ring that is sent from: its first extent, and what else has been wanted of it before, so that a rail
        that could not have it does not come up again. Raises VerbsError."""
        for number in tuple(self._rings.setdefault(memfd, {0: None})):
            self._extent(memfd, number)

    def ring_pieces(self, memfd: Memfd, position: int, nbytes: int) -> tuple[tuple[Region, int, int], ...]:
        """(region, offset, bytes) of the bytes at `position` of a ring; what is new of it is registered. Raises VerbsError."""
        return tuple(
            (self._extent(memfd, number), start, stop - start)
            for number, start, stop in memfd.extents(position, nbytes)
        )

    def _extent(self, memfd: Memfd, number: int) -> Region:
        regions = self._rings.setdefault(memfd, {})
        region = regions.setdefault(number, None)
        if region is None:
            region = regions[number] = self.device.register(memfd.extent_view(number))
        return region

    def listen(self, listener: Callable[[str], None]) -> None:
        """`listener(what)` for every event of the device that may concern a rail, such as `port down`."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[str], None]) -> None:
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def retire(self, pair: QueuePair | None, parts: Sequence[Any]) -> None:
        """Gives back what a rail has made, newest first.

        `pair`, if it was connected, goes out of service now and is given back, with the parts, after a while: destroying it
        may take seconds in which its last packets find no way out, and this process does nothing else meanwhile (software
        devices wait for the packets). No more than `MAX_RETIRED` wait, with their memory.
        """
        if pair is None:
            self._forget(parts)
            return
        with contextlib.suppress(VerbsError):
            pair.fail()
        self._retired.append((parts, self.loop.call_later(RETIRED_S, self._give_back)))
        if len(self._retired) > MAX_RETIRED:
            self._retired[0][1].cancel()
            self._give_back()

    def _give_back(self) -> None:
        """The oldest one."""
        self._forget(self._retired.popleft()[0])

    def _forget(self, parts: Sequence[Any]) -> None:
        for part in parts:
            self.device.forget(part)

    def up(self) -> bool:
        """Whether the port is up now, the chosen address included: it may have gone, or moved, with the link."""
        try:
            self.port = self.device.port(self.port.number)
            if self.gid is not None:
                self.gid = self.port.gid(self.gid.address)
        except VerbsError:
            return False
        return self.port.active

    def _ready(self, mask: int) -> None:
        for event in self.device.events():
            if event == "port down" and self._still_up():
                continue  # another port of the device
            for listener in list(self._listeners):
                listener(event)

    def _still_up(self) -> bool:
        try:
            return self.device.port_count > 1 and self.device.active(self.port.number)
        except VerbsError:
            return False

    def close(self) -> None:
        """Gives back everything, rings included. Rails over it must be closed before. Idempotent."""
        if self._events is not None:
            self.loop.watch(self._events, 0, self._ready)
            self._events = None
        self._rings.clear()
        for _, timer in self._retired:
            timer.cancel()
        self._retired.clear()
        self.device.close()


def find(loop: Loop, wanted: str | Sequence[str] = "auto") -> tuple[list[Nic], list[str]]:
    """Opens the ports to use.

    Args:
        wanted: `auto`: every port that is up; else names, `mlx5_0` (its first port) or `mlx5_0:2`, or addresses, in the
            order of the rails.

    Returns:
        The ports, and a reason for each that cannot be used.
    """
    known, problems = verbs.ports()
    if not known:
        return [], problems
    if wanted == "auto":
        chosen = [port for port in known if port.active]
        problems += [f"{port.device} port {port.number} is down" for port in known if not port.active]
        picks: list[tuple[str, int, str | None]] = [(port.device, port.number, None) for port in chosen]
    else:
        picks = []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            pick = _pick(name, known)
            if pick is None:
                have = ", ".join(f"{port.device}:{port.number}" for port in known)
                problems.append(f"there is no RDMA device or address {name}; this host has {have}")
            else:
                picks.append(pick)
    nics: list[Nic] = []
    for device, number, address in picks:
        try:
            nics.append(Nic(loop, device, number, address))
        except VerbsError as error:
            problems.append(str(error))
    return nics, problems


def _pick(name: str, known: Sequence[Port]) -> tuple[str, int, str | None] | None:
    device, _, number = name.partition(":")
    for port in known:
        if port.device == device and (number or "1") == str(port.number):
            return port.device, port.number, None
        if any(gid.address == name for gid in port.gids):
            return port.device, port.number, name
    return None


def pairs(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Which of our ports goes with which of a peer's: indices into both lists of `Nic.info`, in our order.

    Ports of one kind are joined, each at most once: those whose addresses have most in common first (rails often are subnets
    of their own), then in their order. Both ends come to the same pairs.
    """
    candidates = []
    for i, own in enumerate(mine):
        for j, other in enumerate(theirs):
            if (own.get("layer"), own.get("kind")) == (other.get("layer"), other.get("kind")):
                common = _common_bits(str(own.get("address", "")), str(other.get("address", "")))
                # the last two keys are the same seen from the other end, so ties fall alike there
                candidates.append((-common, abs(i - j), i + j, i, j))
    found: list[tuple[int, int]] = []
    for *_, i, j in sorted(candidates):
        if all(i != a and j != b for a, b in found):
            found.append((i, j))
    return sorted(found)


def _common_bits(one: str, other: str) -> int:
    """Length of the common prefix of two addresses; 0 if they are none, or of different families."""
    try:
        first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    except ValueError:
        return 0
    if first.version != second.version:
        return 0
    return first.max_prefixlen - (int(first) ^ int(second)).bit_length()
