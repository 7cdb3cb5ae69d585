"""Machines that tests describe: a folder that looks like /sys, /proc and /dev, and look-ups that answer from a table."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from adaptra_plugin.doctor import Machine, Needs, Row, examine
from adaptra_plugin.doctor.machine import UNLIMITED

GIB = 1 << 30
REQUIREMENTS = [
    "torch>=2.4",
    "xxhash>=3",
    'deepspeed<0.20,>=0.16; extra == "deepspeed"',
    'megatron-core<0.20,>=0.14; extra == "megatron"',
    'wandb>=0.17; extra == "wandb"',
    'deepspeed==0.19.8; extra == "dev"',
]
VERSIONS = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "xxhash": "4.1.0"}
PINNED = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 2, "pinned": True, "registered": 0}
PYVERBS = {
    "file": "/venv/site-packages/pyverbs/__init__.py",
    "devices": ["mlx5_0", "mlx5_1"],
    "library": "/usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0",
}


class Tree:
    """Writes the files of a machine and makes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.limits = {
            resource.RLIMIT_MEMLOCK: (UNLIMITED, UNLIMITED),
            resource.RLIMIT_NOFILE: (65536, 65536),
            resource.RLIMIT_NPROC: (UNLIMITED, UNLIMITED),
            resource.RLIMIT_FSIZE: (UNLIMITED, UNLIMITED),
        }
        self.versions = {**VERSIONS, "pyverbs": "44.0"}
        self.requirements = REQUIREMENTS
        self.affinity = set(range(16))
        self.shm = 64 * GIB
        self.pinned: Any = PINNED
        self.pyverbs: Any = PYVERBS
        self.pyverbs_aside: Any = PYVERBS
        self.features: dict[str, Any] = {name: lambda: None for name in ("eventfd", "memfd_create", "pidfd_open")}
        self.apex: Path | None = None
        self.python = (3, 11, 7)
        self.file("/proc/meminfo", "MemTotal: 131072000 kB\nMemAvailable: 104857600 kB\nHugePages_Total: 0\n"
                  "HugePages_Free: 0\nHugepagesize: 2048 kB")  # fmt: skip
        self.file("/proc/sys/kernel/osrelease", "6.1.0-test")
        self.file("/proc/self/status", "Name: x\nCapEff:\t0000000000000000")
        self.file("/proc/self/uid_map", "         0          0 4294967295")
        self.file("/proc/self/cgroup", "0::/")
        self.file("/sys/devices/system/cpu/online", "0-15")
        self.file("/sys/devices/system/node/node0/cpulist", "0-15")
        self.file("/usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0", "")

    def file(self, place: str, text: str) -> None:
        path = self.root / place.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def link(self, place: str, target: str) -> None:
        path = self.root / place.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(self.root / target.lstrip("/"))

    def function(self, way: str, numa: int, **files: str) -> str:
        """A PCI function below `way`; returns its folder."""
        place = f"/sys/devices/{way}"
        self.file(f"{place}/numa_node", str(numa))
        for name, text in files.items():
            self.file(f"{place}/{name}", text)
        self.link(f"/sys/bus/pci/devices/{way.rsplit('/', 1)[-1]}", place)
        return place

    def gpu(self, way: str, numa: int) -> None:
        self.function(way, numa, vendor="0x10de", **{"class": "0x030200"})

    def interface(self, name: str, place: str, state: str = "up", speed: str = "100000") -> None:
        folder = f"{place}/net/{name}"
        self.file(f"{folder}/operstate", state)
        self.file(f"{folder}/speed", speed)
        self.link(f"{folder}/device", place)
        self.link(f"/sys/class/net/{name}", folder)

    def rdma(self, name: str, place: str, number: int, *, interface: str = "", layer: str = "Ethernet",
             state: str = "4: ACTIVE", physical: str = "5: LinkUp",
             gids: tuple[tuple[str, str], ...] = (), node_type: str = "1: CA") -> None:  # fmt: skip
        folder = f"{place}/infiniband/{name}"
        self.file(f"{folder}/node_type", node_type)
        self.file(f"{folder}/fw_ver", "22.39.1002")
        port = f"{folder}/ports/1"
        for file, text in (
            ("state", state),
            ("phys_state", physical),
            ("link_layer", layer),
            ("rate", "100 Gb/sec (4X EDR)"),
        ):
            self.file(f"{port}/{file}", text)
        empty = ("0000:0000:0000:0000:0000:0000:0000:0000", "")
        for index, (gid, kind) in enumerate((*gids, empty)):
            self.file(f"{port}/gids/{index}", gid)
            if kind:
                self.file(f"{port}/gid_attrs/types/{index}", kind)
                self.file(f"{port}/gid_attrs/ndevs/{index}", interface)
        self.link(f"{folder}/device", place)
        self.link(f"/sys/class/infiniband/{name}", folder)
        self.file(f"/sys/class/infiniband_verbs/uverbs{number}/ibdev", name)
        self.file(f"/dev/infiniband/uverbs{number}", "")

    def machine(self) -> Machine:
        return Machine(
            root=self.root,
            limit=self.limits.__getitem__,
            affinity=lambda: self.affinity,
            version=self.versions.get,
            requirements=lambda: self.requirements,
            locate=lambda _: self.apex,
            child=self._child,
            disk=lambda _: (self.shm, 0, self.shm),
            features=self.features,
            python=self.python,
        )

    def _child(self, code: str, *arguments: str) -> dict[str, Any]:
        if "pyverbs" not in code:
            answer = self.pinned
        else:
            answer = self.pyverbs_aside if arguments else self.pyverbs
        if isinstance(answer, Exception):
            raise answer
        return answer

    def rows(self, needs: Needs | None = None) -> dict[str, Row]:
        found = examine(self.machine(), needs or Needs(ranks=2))
        named = {row.check: row for row in found}
        assert len(named) == len(found), "two rows of one name"
        return named


ROCE = (
    ("fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1"),
    ("fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "RoCE v2"),
    ("0000:0000:0000:0000:0000:ffff:0a00:0001", "IB/RoCE v1"),
    ("0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"),
)
"""GIDs of an interface with the address 10.0.0.1: index 3 is the one to use."""


def roce_node(root: Path) -> Tree:
    """Two NUMA nodes, on each a Mellanox card and a GPU behind one PCIe switch."""
    tree = Tree(root)
    tree.file("/sys/devices/system/node/node1/cpulist", "8-15")
    for node, bus in enumerate(("16", "c9")):
        switch = f"pci0000:{bus}/0000:{bus}:02.0"
        card = tree.function(f"{switch}/0000:{bus}:10.0", node, vendor="0x15b3", **{"class": "0x020000"})
        tree.interface(f"ens{node}", card)
        tree.rdma(f"mlx5_{node}", card, node, interface=f"ens{node}", gids=ROCE)
        tree.gpu(f"{switch}/0000:{bus}:11.0", node)
        tree.file(f"/dev/nvidia{node}", "")
    return tree
