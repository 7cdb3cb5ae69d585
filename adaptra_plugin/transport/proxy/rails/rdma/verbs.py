"""A thin layer over pyverbs: which RDMA devices there are, and what can be made from one.

    with contextlib.closing(Device("mlx5_0")) as device:
        region = device.register(memory)
        queue = device.completions(depth=256)
        pair = device.queue_pair(queue, sends=128, receives=128)

Listing works without devices and without pyverbs, and then says why there is nothing. All errors are `VerbsError`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptra_plugin.transport.proxy.rails.rdma.queues import MTUS, Completion, Completions, QueuePair, Region, Work
from adaptra_plugin.transport.proxy.rails.rdma.verbs_library import (
    Gid,
    VerbsError,
    event_descriptors,
    load,
    status_text,
    told,
)

__all__ = [
    "Completion",
    "Completions",
    "Device",
    "Gid",
    "Port",
    "QueuePair",
    "Region",
    "VerbsError",
    "Work",
    "devices",
    "ports",
    "status_text",
    "unavailable",
]

_SYSFS = Path("/sys/class/infiniband")
_ACTIVE = 4  # ibv_port_state
_left_alone: list[Device] = []  # a forked child's copies of its parent's
_LINK_LAYERS = {0: "infiniband", 1: "infiniband", 2: "ethernet"}
_GID_KINDS = {0: "ib", 1: "roce1", 2: "roce2"}


@dataclass(frozen=True, slots=True)
class Port:
    """A port of an RDMA device as it is now."""

    device: str
    number: int
    active: bool
    link_layer: str
    """ethernet or infiniband."""
    mtu: int
    """Bytes."""
    lid: int
    numa_node: int | None
    rate: str
    """In the kernel's words, such as `100 Gb/sec (4X EDR)`; empty if unknown."""
    gids: tuple[Gid, ...]

    def gid(self, address: str | None = None) -> Gid:
        """The entry to use: that of `address`, or the best there is: RoCE v2 with an IPv4 address, RoCE v2, any.

        Raises:
            VerbsError: there is none; says which there are.
        """
        if address is not None:
            wanted = ipaddress.ip_address(address)
            found = [g for g in self.gids if ipaddress.ip_address(g.address) == wanted]
        else:
            # link-local addresses reach no other subnet, so they come last within a kind
            found = [g for g in self.gids if not ipaddress.ip_address(g.address).is_link_local] or list(self.gids)
        if not found:
            have = ", ".join(f"{g.address} ({g.kind})" for g in self.gids) or "none"
            raise VerbsError(f"{self.device} port {self.number} has no address {address or 'at all'}; it has: {have}")
        return min(found, key=lambda g: (g.kind == "roce1", ":" in g.address, g.index))


def devices() -> list[str]:
    """Names of the RDMA devices of this machine, from sysfs; needs no pyverbs."""
    return sorted(entry.name for entry in _SYSFS.iterdir()) if _SYSFS.is_dir() else []


def unavailable() -> str | None:
    """Why this process cannot use RDMA, in words that say what to change; None: it can."""
    if not devices():
        return f"this machine has no RDMA device ({_SYSFS} has none)"
    try:
        load()
    except VerbsError as error:
        return str(error)
    if not list(Path("/dev/infiniband").glob("uverbs*")):
        return "the RDMA devices are not in /dev/infiniband (container? pass --device /dev/infiniband)"
    return None


def ports() -> tuple[list[Port], list[str]]:
    """All ports of all devices, and a reason for each device (or all of them) that cannot be used. Never raises."""
    reason = unavailable()
    if reason is not None:
        return [], [reason]
    found: list[Port] = []
    problems: list[str] = []
    for name in devices():
        try:
            with contextlib.closing(Device(name)) as device:
                found += [device.port(number) for number in range(1, device.port_count + 1)]
        except VerbsError as error:
            problems.append(str(error))
    return found, problems


def _text_of(raw: str) -> str:
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def _interface(index: int) -> str | None:
    try:
        return socket.if_indextoname(index) if index > 0 else None
    except OSError:
        return None


def _sysfs(name: str, *path: str) -> str:
    try:
        return _SYSFS.joinpath(name, *path).read_text().strip()
    except OSError:
        return ""


class Device:
    """An open device with a protection domain; owns all that is made from it and gives it back in `close`."""

    def __init__(self, name: str) -> None:
        """Raises VerbsError."""
        modules = load()
        self.name = name
        self._children: list[Any] = []
        before = event_descriptors()
        with told(f"open the RDMA device {name}", _remedy_open(name)):
            self._context = modules.device.Context(name=name)
            self._domain = modules.pd.PD(self._context)
            attributes = self._context.query_device()
        # pyverbs tells no descriptor of its own, so it is the one that has appeared
        appeared = sorted(event_descriptors() - before)
        self.events_fd: int | None = appeared[0] if len(appeared) == 1 else None
        """Readable when the device has an event to report (`events`); None: this system offers none."""
        if self.events_fd is not None:
            os.set_blocking(self.events_fd, False)
        self.port_count = int(attributes.phys_port_cnt)
        self.max_requests = int(attributes.max_qp_wr)
        self.max_completions = int(attributes.max_cqe)
        self.max_gather = int(attributes.max_sge)
        """Pieces of memory that one request can send."""
        self._closed = self._abandoned = False

    def port(self, number: int = 1) -> Port:
        """Raises VerbsError."""
        self._require_open()
        with told(f"query port {number} of {self.name}"):
            attributes = self._context.query_port(number)
            entries = self._context.query_gid_table(max(1, int(attributes.gid_tbl_len) * self.port_count))
        node = _sysfs(self.name, "device", "numa_node")
        gids = []
        for entry in entries:
            if entry.port_num == number:
                raw = entry.gid_str()
                kind = _GID_KINDS.get(entry.gid_type, "ib")
                gids.append(Gid(entry.gid_index, _text_of(raw), kind, _interface(entry.ndev_ifindex), raw))
        return Port(
            device=self.name,
            number=number,
            active=attributes.state == _ACTIVE,
            link_layer=_LINK_LAYERS.get(attributes.link_layer, "infiniband"),
            mtu=MTUS.get(attributes.active_mtu, 1024),
            lid=int(attributes.lid),
            numa_node=int(node) if node.lstrip("-").isdecimal() and int(node) >= 0 else None,
            rate=_sysfs(self.name, "ports", str(number), "rate"),
            gids=tuple(gids),
        )

    def active(self, number: int = 1) -> bool:
        """Whether the port is up; cheaper than `port`. Raises VerbsError."""
        self._require_open()
        with told(f"query port {number} of {self.name}"):
            return bool(self._context.query_port(number).state == _ACTIVE)

    def events(self) -> list[str]:
        """Names of the events since the last call, such as `port down`; never blocks. Raises VerbsError."""
        self._require_open()
        modules, found = load(), []
        enums = modules.enums
        names = {
            enums.IBV_EVENT_PORT_ERR: "port down",
            enums.IBV_EVENT_PORT_ACTIVE: "port up",
            enums.IBV_EVENT_DEVICE_FATAL: "device failed",
            enums.IBV_EVENT_QP_FATAL: "queue pair failed",
            enums.IBV_EVENT_QP_REQ_ERR: "queue pair failed: bad request",
            enums.IBV_EVENT_QP_ACCESS_ERR: "queue pair failed: access refused",
            enums.IBV_EVENT_CQ_ERR: "completion queue overrun",
        }
        while self.events_fd is not None:
            try:
                event = self._context.get_async_event()
            except modules.pyverbs_error.PyverbsError:
                break  # nothing more: the descriptor does not block
            found.append(names.get(event.event_type, f"event {event.event_type}"))
            event.ack()
        return found

    def register(self, memory: memoryview, remote_write: bool = False) -> Region:
        """Pins writable memory for the device; it stays mapped until the region is closed. Raises VerbsError."""
        self._require_open()
        region = Region(self._domain, memory, remote_write)
        self._children.append(region)
        return region

    def completions(self, depth: int) -> Completions:
        """A queue for at least `depth` completions (at most what the device can). Raises VerbsError."""
        self._require_open()
        queue = Completions(self._context, min(depth, self.max_completions))
        self._children.append(queue)
        return queue

    def queue_pair(
        self, completions: Completions, sends: int, receives: int, number: int = 1, gather: int = 1
    ) -> QueuePair:
        """A new pair on port `number`, in state INIT, for so many posted requests, each of which sends at most `gather`
        pieces (no more than `max_gather`). Raises VerbsError."""
        self._require_open()
        pair = QueuePair(
            self,
            self._domain,
            completions,
            min(sends, self.max_requests),
            min(receives, self.max_requests),
            number,
            gather,
        )
        self._children.append(pair)
        return pair

    def _require_open(self) -> None:
        """pyverbs would follow a null pointer."""
        if self._closed:
            raise VerbsError(f"the RDMA device {self.name} has been closed")

    def close(self) -> None:
        """Closes all that was made from this device, newest first. Idempotent; never raises."""
        if self._closed or self._abandoned:
            return
        self._closed = True
        for child in reversed(self._children):
            child.close()
        self._children.clear()
        for thing in (self._domain, self._context):
            with contextlib.suppress(load().pyverbs_error.PyverbsError):
                thing.close()

    def abandon(self) -> None:
        """In a forked child, where all of this is the parent's too: nothing is given back, now or by a collection."""
        self._abandoned = True
        _left_alone.append(self)

    def forget(self, child: Any) -> None:
        """Closes one thing that was made from this device, before the device is."""
        if self._abandoned:
            return
        with contextlib.suppress(ValueError):
            self._children.remove(child)
        child.close()


def _remedy_open(name: str) -> str:
    if name not in devices():
        return f"; this machine has: {', '.join(devices()) or 'none'}"
    return ""
