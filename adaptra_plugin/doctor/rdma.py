"""RDMA devices, from sysfs: ports, link layers, GIDs, and the device files with which user programs reach them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass

from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status

BASE = "/sys/class/infiniband"
SHOWN_GIDS = 3
"""GIDs in a row; the rest is counted."""
NONE_FOUND = "no RDMA devices, TCP and shared memory will be used"


@dataclass(frozen=True)
class Gid:
    index: int
    address: ipaddress.IPv6Address
    kind: str
    """As the kernel writes it: `IB/RoCE v1`, `RoCE v2`."""

    @property
    def routable(self) -> bool:
        return not self.address.is_link_local

    def __str__(self) -> str:
        return f"{self.index} {self.address.ipv4_mapped or self.address} ({self.kind})"


@dataclass(frozen=True)
class Port:
    """One port of one device."""

    device: str
    number: str
    state: str
    """ACTIVE, DOWN, INIT, ARMED, or what the kernel says."""
    physical: str
    layer: str
    """InfiniBand or Ethernet."""
    rate: str
    firmware: str
    iwarp: bool
    gids: tuple[Gid, ...]
    interface: str

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number}"


def ports(machine: Machine) -> list[Port]:
    """All ports of all devices."""
    found = []
    for device in machine.names(BASE):
        for number in machine.names(f"{BASE}/{device}/ports"):
            folder = f"{BASE}/{device}/ports/{number}"
            found.append(
                Port(
                    device=device,
                    number=number,
                    state=_word(machine.text(f"{folder}/state")),
                    physical=_word(machine.text(f"{folder}/phys_state")),
                    layer=machine.text(f"{folder}/link_layer") or "unknown link layer",
                    rate=machine.text(f"{folder}/rate") or "unknown rate",
                    firmware=machine.text(f"{BASE}/{device}/fw_ver") or "unknown",
                    iwarp=(machine.text(f"{BASE}/{device}/node_type") or "").startswith("4"),
                    gids=tuple(_gids(machine, folder)),
                    interface=_interface(machine, folder),
                )
            )
    return found


def wanted(machine: Machine, needs: Needs) -> list[Port]:
    """Ports of the devices that the job may use."""
    if not needs.wants_rdma:
        return []
    return [port for port in ports(machine) if needs.rdma_devices is None or port.device in needs.rdma_devices]


def usable(machine: Machine, needs: Needs) -> bool:
    """Whether the job can use any port."""
    return any(_judge(port)[0] is Status.OKAY for port in wanted(machine, needs))


def rdma(machine: Machine, needs: Needs) -> Iterator[Row]:
    """A row for the node, one per port, and one for the device files."""
    worst = Status.FAIL if needs.insists_on_rdma else Status.WARN
    found = wanted(machine, needs) if needs.wants_rdma else ports(machine)
    absent = sorted(set(needs.rdma_devices or ()) - set(machine.names(BASE)))
    if absent:
        here = ", ".join(machine.names(BASE)) or "none"
        words = f"adaptra.transport.rdma_devices names {', '.join(absent)}; this node has {here}"
        yield Row("rdma names", Status.FAIL, words, "correct the names (`rdma link` lists them), or leave them to auto")
    if not found:
        advice = "for RDMA: look at `lspci` and the driver's messages (`dmesg`); in a container pass the devices on"
        if needs.insists_on_rdma:
            yield Row("rdma", worst, "no RDMA devices, but adaptra.transport.rail is rdma", advice)
        elif not needs.wants_rdma:
            yield Row("rdma", Status.OKAY, "no RDMA devices; the configuration needs none")
        else:
            yield Row("rdma", worst, NONE_FOUND, advice)
        return
    good = [port for port in found if _judge(port)[0] is Status.OKAY]
    names = sorted({port.device for port in found})
    total = f"{len(names)} device{'s' * (len(names) > 1)}, {len(good)} of {len(found)} ports usable"
    if good:
        yield Row("rdma", Status.OKAY, total)
    else:
        yield Row("rdma", worst, f"{total}: TCP and shared memory will be used", "see the ports below")
    for port in found:
        status, advice = _judge(port)
        yield Row(f"rdma {port.name}", status, _describe(port), advice)
    yield from _files(machine, names, worst)


def _describe(port: Port) -> str:
    shown = ", ".join(str(gid) for gid in _best_first(port.gids)[:SHOWN_GIDS])
    more = f" and {len(port.gids) - SHOWN_GIDS} more" if len(port.gids) > SHOWN_GIDS else ""
    layer = "iWARP" if port.iwarp else port.layer
    physical = f" ({port.physical})" if port.state != "ACTIVE" and port.physical != "unknown" else ""
    interface = f", interface {port.interface}" if port.interface else ""
    gids = f"GIDs {shown}{more}" if shown else "no GIDs"
    return f"{port.state}{physical}, {layer}, {port.rate}, firmware {port.firmware}{interface}, {gids}"


def _judge(port: Port) -> tuple[Status, str]:
    """Whether the port can be used, and what to do if not."""
    where = port.interface or port.device
    if port.iwarp:
        return Status.WARN, "iWARP cannot write with an immediate value and is not used"
    if port.state in ("INIT", "ARMED") and port.layer == "InfiniBand":
        return Status.WARN, "no subnet manager has configured this port: start opensm, or ask who runs the switch"
    if port.state != "ACTIVE":
        if port.physical == "Disabled" and port.layer == "Ethernet":
            return Status.WARN, f"the interface is off: `ip link set {where} up`"
        return Status.WARN, "not active: look at the cable and the switch's port (`ibstat`, `rdma link`)"
    if not port.gids:
        return Status.WARN, f"no GID: give {where} an IP address"
    if port.layer == "Ethernet":
        if not any(gid.kind == "RoCE v2" for gid in port.gids):
            return (
                Status.WARN,
                f"no RoCE v2 GID, so packets cannot be routed: set the card to RoCE v2 and give {where} an IP address",
            )
        if not any(gid.kind == "RoCE v2" and gid.routable for gid in port.gids):
            return Status.OKAY, f"only link-local GIDs: peers must be in the same subnet, or give {where} an IP address"
    return Status.OKAY, ""


def _files(machine: Machine, names: list[str], worst: Status) -> Iterator[Row]:
    """Device files: what a container lacks when it sees the host's sysfs only."""
    verbs = {
        machine.text(f"/sys/class/infiniband_verbs/{name}/ibdev"): f"/dev/infiniband/{name}"
        for name in machine.names("/sys/class/infiniband_verbs")
    }
    wrong = []
    for name in names:
        file = verbs.get(name)
        if file is None:
            wrong.append(f"{name} has none (is the module ib_uverbs loaded?)")
        elif not machine.path(file).exists():
            wrong.append(f"{file} of {name} is missing")
        elif not os.access(machine.path(file), os.R_OK | os.W_OK):
            wrong.append(f"no permission for {file} of {name}")
    if wrong:
        advice = (
            "`modprobe ib_uverbs`; Docker: --device=/dev/infiniband; or let the job's user read and write these files"
        )
        yield Row("rdma device files", worst, "; ".join(wrong), advice)
    else:
        yield Row("rdma device files", Status.OKAY, ", ".join(str(verbs[name]) for name in names))


def _gids(machine: Machine, folder: str) -> Iterator[Gid]:
    for name in machine.names(f"{folder}/gids"):
        text = machine.text(f"{folder}/gids/{name}")
        try:
            address = ipaddress.IPv6Address(text or "::")
        except ValueError:
            continue
        # the second half of an unused entry is zero; the first holds the subnet's prefix
        if int(address) & (1 << 64) - 1:
            yield Gid(int(name), address, machine.text(f"{folder}/gid_attrs/types/{name}") or "unknown type")


def _best_first(gids: tuple[Gid, ...]) -> list[Gid]:
    return sorted(
        gids, key=lambda gid: (gid.kind != "RoCE v2", not gid.routable, gid.address.ipv4_mapped is None, gid.index)
    )


def _interface(machine: Machine, folder: str) -> str:
    names = {machine.text(f"{folder}/gid_attrs/ndevs/{name}") for name in machine.names(f"{folder}/gid_attrs/ndevs")}
    return ", ".join(sorted(name for name in names if name))


def _word(text: str | None) -> str:
    """`ACTIVE` of `4: ACTIVE`."""
    return (text or "").rpartition(":")[2].strip() or "unknown"
