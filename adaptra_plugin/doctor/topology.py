"""Network cards and GPUs, and how far they are from each other: all from sysfs, no driver is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status

GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D, other displays, processing accelerators: the first digits of a PCI class."""
PCI = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]$")


@dataclass
class Nic:
    """A network card (one PCI function) with the names of its interfaces and RDMA devices."""

    place: str
    """Its folder in /sys/devices."""
    numa: int
    interfaces: list[str] = field(default_factory=list)
    rdma: list[str] = field(default_factory=list)
    up: bool = False
    mbps: int = 0
    """Speed of the fastest interface that is up (Mb/s); 0: unknown."""

    @property
    def name(self) -> str:
        return "/".join(self.rdma + self.interfaces)

    def __str__(self) -> str:
        speed = f", {self.mbps / 1000:g} Gb/s" if self.mbps > 0 else ""
        return f"{self.name} ({'up' if self.up else 'down'}{speed})"


def find_nics(machine: Machine) -> list[Nic]:
    """Cards with hardware behind them, in the order of their places."""
    cards: dict[str, Nic] = {}
    for kind in ("net", "infiniband"):
        for name in machine.names(f"/sys/class/{kind}"):
            base = f"/sys/class/{kind}/{name}"
            if not machine.path(f"{base}/device").exists():
                continue  # a bridge, a tunnel, soft RoCE
            place = _function(machine.real(f"{base}/device"))
            card = cards.setdefault(place, Nic(place, _numa(machine, place)))
            if kind == "infiniband":
                card.rdma.append(name)
                states = (machine.text(f"{base}/ports/{port}/state") for port in machine.names(f"{base}/ports"))
                card.up |= any((state or "").endswith("ACTIVE") for state in states)
                continue
            card.interfaces.append(name)
            if machine.text(f"{base}/operstate") == "up":
                card.up = True
                card.mbps = max(card.mbps, machine.number(f"{base}/speed") or 0)
    return [cards[place] for place in sorted(cards)]


def network_cards(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Cards by NUMA node."""
    cards = find_nics(machine)
    if not cards:
        seen = ", ".join(machine.names("/sys/class/net")) or "none"
        yield Row("network cards", Status.WARN, f"no hardware is seen, only the interfaces {seen}", (
            "in a container, ask the host; otherwise look at `ip link`"
        ))  # fmt: skip
        return
    parts = []
    for node in sorted({card.numa for card in cards} | set(_nodes(machine))):
        here = [str(card) for card in cards if card.numa == node]
        where = f"NUMA {node}" if node >= 0 else "NUMA unknown"
        parts.append(f"{where}: {', '.join(here) or 'none'}")
    if any(card.up for card in cards):
        yield Row("network cards", Status.OKAY, "; ".join(parts))
    else:
        yield Row("network cards", Status.WARN, "; ".join(parts), "none is up: look at `ip link` and at the cables")


def interfaces(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Interfaces that the configuration names; addresses are left to the transport, which binds to them."""
    names = [
        name for name in needs.interfaces if not re.search(r"[.:]", name) or name in machine.names("/sys/class/net")
    ]
    absent = [name for name in names if name not in machine.names("/sys/class/net")]
    off = [name for name in names if machine.text(f"/sys/class/net/{name}/operstate") == "down"]
    if absent:
        words = f"adaptra.transport.interfaces names {', '.join(absent)}; this node has none of that name"
        yield Row("interfaces", Status.FAIL, words, f"expected: {', '.join(machine.names('/sys/class/net'))}")
    elif off:
        advice = f"`ip link set {off[0]} up`, or look at the cable"
        yield Row("interfaces", Status.WARN, f"down: {', '.join(off)}; one rail less each", advice)
    elif names:
        yield Row("interfaces", Status.OKAY, ", ".join(names))


def gpus(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Each GPU with the card that is nearest to it."""
    places = find_gpus(machine)
    if not places:
        count = count_gpus(machine)
        if count:
            found = f"{count} GPUs (/dev/nvidia*), but sysfs shows none"
            yield Row(
                "gpus", Status.WARN, found, "mount the host's /sys in the container to see how they are connected"
            )
        else:
            yield Row("gpus", Status.OKAY, "none: the job computes on processors")
        return
    cards = [card for card in find_nics(machine) if card.up] or find_nics(machine)
    for place in places:
        address = place.rsplit("/", 1)[-1]
        vendor = GPU_VENDORS[machine.text(f"{place}/vendor") or ""]
        numa = _numa(machine, place)
        found = f"{vendor}, {'NUMA ' + str(numa) if numa >= 0 else 'NUMA unknown'}"
        check = f"gpu {address}"
        if not cards:
            yield Row(check, Status.OKAY, f"{found}; no network card to be near to")
            continue
        nearest = max(cards, key=lambda card: (_nearness(place, numa, card), card.mbps))
        rank = _nearness(place, numa, nearest)
        found += f"; nearest card {nearest}: {NEARNESS[min(rank, len(NEARNESS) - 1)]}"
        if rank > 0 or len(_nodes(machine)) < 2:
            yield Row(check, Status.OKAY, found)
        else:
            advice = (
                "its traffic crosses from socket to socket: put a card on this NUMA node, or give its rank to "
                f"NUMA {nearest.numa}"
                if numa >= 0 and nearest.numa >= 0
                else "its distance is unknown (a virtual machine?): ask `nvidia-smi topo -m`"
            )
            yield Row(check, Status.WARN, found, advice)


NEARNESS = ("on another NUMA node", "on the same NUMA node", "on the same host bridge", "behind the same PCIe switch")
"""By rank; higher is nearer."""


def _nearness(place: str, numa: int, card: Nic) -> int:
    """Rank of NEARNESS: from 2 on the number of shared steps of the way down from the root of the PCI tree, and one more."""
    shared = 0
    for mine, its in zip(_way(place), _way(card.place), strict=False):
        if mine != its:
            break
        shared += 1
    return shared + 1 if shared else int(numa >= 0 and numa == card.numa)


def _way(place: str) -> list[str]:
    return place.split("/")[3:]  # without /sys/devices


def find_gpus(machine: Machine) -> list[str]:
    """Folders in /sys/devices of the GPUs on the PCI bus, in the order of their addresses."""
    found = []
    for name in machine.names("/sys/bus/pci/devices"):
        base = f"/sys/bus/pci/devices/{name}"
        kind = machine.text(f"{base}/class") or ""
        if machine.text(f"{base}/vendor") in GPU_VENDORS and kind[:6] in GPU_CLASSES:
            found.append(machine.real(base))
    return sorted(found, key=lambda place: place.rsplit("/", 1)[-1])


def count_gpus(machine: Machine) -> int:
    """GPUs that this process can open; those on the bus where no driver has made device files."""
    given = [name for name in machine.names("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return len(given) or len(find_gpus(machine))


def _function(place: str) -> str:
    """The PCI function at or above a folder: virtio and others hang below it."""
    parts = place.split("/")
    for end in range(len(parts), 0, -1):
        if PCI.match(parts[end - 1]):
            return "/".join(parts[:end])
    return place


def _numa(machine: Machine, place: str) -> int:
    """NUMA node, -1 if unknown. Where there is but one node, it is that one."""
    node = machine.number(f"{place}/numa_node")
    nodes = _nodes(machine)
    if node is None or node < 0:
        return nodes[0] if len(nodes) == 1 else -1
    return node


def _nodes(machine: Machine) -> list[int]:
    names = machine.names("/sys/devices/system/node")
    return sorted(int(name[4:]) for name in names if re.fullmatch(r"node\d+", name))
