"""A RoCE node that is ready, and what is said when one thing of it is wrong."""

from __future__ import annotations

import resource

import pytest

from adaptra_plugin.config import parse_config
from adaptra_plugin.doctor import Needs, Row, Status
from adaptra_plugin.doctor.machine import UNLIMITED
from tests.doctor.machines import PYVERBS, ROCE, Tree, roce_node


@pytest.fixture
def node(tmp_path) -> Tree:
    return roce_node(tmp_path)


def test_a_node_in_order_has_only_okay_rows(node):
    rows = node.rows()
    assert {row.check: row.found for row in rows.values() if row.status is not Status.OKAY} == {}
    assert rows["rdma"].found == "2 devices, 2 of 2 ports usable"
    assert rows["rdma mlx5_0:1"].found == (
        "ACTIVE, Ethernet, 100 Gb/sec (4X EDR), firmware 22.39.1002, interface ens0, GIDs 3 10.0.0.1 (RoCE v2), "
        "1 fe80::e42:a1ff:fe00:1 (RoCE v2), 2 10.0.0.1 (IB/RoCE v1) and 1 more"
    )
    assert rows["network cards"].found == ("NUMA 0: mlx5_0/ens0 (up, 100 Gb/s); NUMA 1: mlx5_1/ens1 (up, 100 Gb/s)")
    nearest = "nearest card mlx5_1/ens1 (up, 100 Gb/s): behind the same PCIe switch"
    assert rows["gpu 0000:c9:11.0"].found == f"NVIDIA, NUMA 1; {nearest}"
    assert rows["rdma device files"].found == "/dev/infiniband/uverbs0, /dev/infiniband/uverbs1"
    assert rows["pyverbs"].found == "44.0 from /venv/site-packages/pyverbs/__init__.py, 2 devices seen; rdma-core 44.0"
    assert "2 GPUs" in rows["pinned memory"].found


@pytest.mark.parametrize(
    ("limits", "capability", "status", "words"),
    [
        ((64 << 10, 64 << 10), 0, Status.FAIL, "memlock unlimited"),
        ((64 << 10, UNLIMITED), 0, Status.FAIL, "`ulimit -l unlimited`"),
        ((64 << 10, 1 << 30), 0, Status.FAIL, "`ulimit -l 1048576`"),
        (((1 << 30) - 1, (1 << 30) - 1), 0, Status.FAIL, "memlock unlimited"),
        ((1 << 30, 1 << 30), 0, Status.OKAY, ""),
        ((64 << 10, 64 << 10), 1 << 14, Status.OKAY, "as the user of the job"),
        ((64 << 10, 64 << 10), ~(1 << 14) & 0xFFFF, Status.FAIL, "memlock unlimited"),
    ],
)
def test_memlock_is_compared_with_the_rings_of_a_rank(node, limits, capability, status, words):
    node.limits[resource.RLIMIT_MEMLOCK] = limits
    node.file("/proc/self/status", f"CapEff:\t{capability:016x}")
    row = node.rows()["memlock"]
    assert row.status is status
    assert words in row.advice
    assert (
        "up to 1 GiB a rank (64 MiB x 2 lanes x 2 directions x 2 neighbours, a ring and a receive ring each, "
        in row.found
    )


def test_the_capability_of_a_user_namespace_does_not_lift_memlock(node):
    node.limits[resource.RLIMIT_MEMLOCK] = (64 << 10, 64 << 10)
    node.file("/proc/self/status", "CapEff:\t000001ffffffffff")
    node.file("/proc/self/uid_map", "0 1000 1")
    assert node.rows()["memlock"].status is Status.FAIL


def test_without_rdma_in_the_configuration_nothing_of_it_is_wanted(node):
    node.limits[resource.RLIMIT_MEMLOCK] = (64 << 10, 64 << 10)
    node.pyverbs = node.pyverbs_aside = {"error": "ModuleNotFoundError: no"}
    rows = node.rows(Needs(parse_config({"transport": {"rail": "tcp"}}), 2))
    assert rows["memlock"].status is Status.WARN
    assert "the configuration switches RDMA off" in rows["memlock"].found
    assert rows["pyverbs"].status is Status.OKAY


def with_transport(**changes) -> Needs:
    """Also with keys that the configuration of this version need not know."""
    config = parse_config({})
    return Needs(config.model_copy(update={"transport": config.transport.model_copy(update=changes)}), 2)


def test_devices_that_the_configuration_names(node):
    node.file("/sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    rows = node.rows(with_transport(rdma_devices=("mlx5_1", "mlx5_7")))
    assert rows["rdma names"].status is Status.FAIL
    assert rows["rdma names"].found.endswith("names mlx5_7; this node has mlx5_0, mlx5_1")
    assert "rdma mlx5_0:1" not in rows
    assert rows["rdma"].found.startswith("1 device, 0 of 1 ports usable")
    node.limits[resource.RLIMIT_MEMLOCK] = (64 << 10, 64 << 10)
    assert node.rows(with_transport(rdma_devices=("mlx5_1",)))["memlock"].status is Status.WARN
    assert node.rows(with_transport(rdma_devices=("mlx5_0",)))["memlock"].status is Status.FAIL
    assert node.rows(with_transport(rdma_devices=()))["memlock"].status is Status.WARN


def test_interfaces_that_the_configuration_names(node):
    assert "interfaces" not in node.rows()
    assert node.rows(with_transport(interfaces=("ens0", "10.0.0.7")))["interfaces"].found == "ens0"
    row = node.rows(with_transport(interfaces=("ens0", "ens7")))["interfaces"]
    assert (row.status, "names ens7" in row.found) == (Status.FAIL, True)
    node.file("/sys/class/net/ens1/operstate", "down")
    row = node.rows(with_transport(interfaces=("ens0", "ens1")))["interfaces"]
    assert (row.status, row.found.startswith("down: ens1;")) == (Status.WARN, True)


@pytest.mark.parametrize(
    ("changes", "status", "advice"),
    [
        ({"layer": "InfiniBand", "state": "1: DOWN", "physical": "2: Polling"}, Status.WARN, "cable"),
        ({"layer": "InfiniBand", "state": "2: INIT"}, Status.WARN, "opensm"),
        ({"state": "1: DOWN", "physical": "3: Disabled"}, Status.WARN, "`ip link set ens0 up`"),
        ({"gids": ROCE[:1]}, Status.WARN, "no RoCE v2 GID"),
        ({"gids": ROCE[:2]}, Status.OKAY, "only link-local GIDs"),
        ({"gids": ()}, Status.WARN, "no GID"),
        ({"node_type": "4: RNIC"}, Status.WARN, "iWARP"),
        ({"layer": "InfiniBand", "gids": (("fe80::e42:a1ff:fe00:1", "IB/RoCE v1"),)}, Status.OKAY, ""),
    ],
)
def test_a_port_that_cannot_be_used_says_why(tmp_path, changes, status, advice):
    tree = Tree(tmp_path)
    card = tree.function("pci0000:16/0000:16:10.0", 0)
    tree.interface("ens0", card)
    tree.rdma("mlx5_0", card, 0, **{"interface": "ens0", "gids": ROCE, **changes})
    rows = tree.rows()
    assert rows["rdma mlx5_0:1"].status is status
    assert advice in rows["rdma mlx5_0:1"].advice
    assert rows["rdma"].status is status
    assert f"{int(status is Status.OKAY)} of 1 ports usable" in rows["rdma"].found


def test_device_files_that_a_container_lacks(node):
    (node.root / "dev/infiniband/uverbs1").unlink()
    row = node.rows()["rdma device files"]
    assert (row.status, row.found) == (Status.WARN, "/dev/infiniband/uverbs1 of mlx5_1 is missing")
    assert "--device=/dev/infiniband" in row.advice
    (node.root / "sys/class/infiniband_verbs/uverbs0/ibdev").unlink()
    assert "mlx5_0 has none" in node.rows()["rdma device files"].found


def test_pyverbs_of_another_release(node):
    node.versions["pyverbs"] = "59.0"
    row = node.rows()["pyverbs"]
    assert row.status is Status.WARN
    assert row.found.endswith("rdma-core 44.0; they do not fit each other")
    assert "`pip uninstall pyverbs`" in row.advice
    assert "PyPI's pyverbs does not fit unless its version is 44" in row.advice


def test_pyverbs_that_does_not_load(node):
    node.versions["pyverbs"] = "59.0"
    node.pyverbs = {"error": "ImportError: version `IBVERBS_1.15' not found", "library": None}
    row = node.rows()["pyverbs"]
    assert row.status is Status.WARN
    assert row.found.startswith("59.0 from PyPI cannot be imported: ImportError: version `IBVERBS_1.15' not found")
    assert "rdma-core 44.0" in row.found  # by the library's file name
    assert "python3-pyverbs" in row.advice


def test_a_broken_pyverbs_of_pip_hides_that_of_the_distribution(node):
    node.pyverbs = {"error": "ImportError: undefined symbol"}
    node.file("/usr/lib/python3/dist-packages/pyverbs/__init__.py", "")
    assert "undefined symbol" in node.rows()["pyverbs"].found


def test_pyverbs_that_takes_its_process_with_it(node):
    node.pyverbs = RuntimeError("ended with code -11: it said nothing")
    row = node.rows()["pyverbs"]
    assert (row.status, "ended with code -11" in row.found) == (Status.WARN, True)


def test_the_distributions_pyverbs_is_found_beside_pythons_path(node):
    del node.versions["pyverbs"]
    node.pyverbs = {"error": "ModuleNotFoundError: No module named 'pyverbs'"}
    node.pyverbs_aside = {**PYVERBS, "file": "/usr/lib/python3/dist-packages/pyverbs/__init__.py"}
    assert "apt install python3-pyverbs" in node.rows()["pyverbs"].advice  # it is not there yet
    node.file("/usr/lib/python3/dist-packages/pyverbs/__init__.py", "")
    node.file(
        "/var/lib/dpkg/status", "Package: a\nVersion: 1\n\nPackage: python3-pyverbs\nStatus: ok\nVersion: 44.0-2\n\n"
    )
    row = node.rows()["pyverbs"]
    place = "/usr/lib/python3/dist-packages/pyverbs"
    assert row == Row("pyverbs", Status.OKAY, f"44.0 from {place}/__init__.py, 2 devices seen; rdma-core 44.0")
    node.pyverbs_aside = {"error": "ImportError: cannot import name 'base'"}
    row = node.rows()["pyverbs"]
    assert (row.status, row.advice.startswith(f"{place} is for another Python")) == (Status.WARN, True)


def test_a_card_without_its_driver_library(node):
    node.pyverbs = {**PYVERBS, "devices": ["mlx5_0"]}
    row = node.rows()["pyverbs"]
    assert (row.status, "it does not see mlx5_1" in row.found) == (Status.WARN, True)
    assert "ibverbs-providers" in row.advice


def test_a_gpu_whose_nearest_card_is_on_the_other_socket(node):
    node.file("/sys/class/net/ens1/operstate", "down")
    node.file("/sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    rows = node.rows()
    far = rows["gpu 0000:c9:11.0"]
    assert far.status is Status.WARN
    assert far.found.endswith("nearest card mlx5_0/ens0 (up, 100 Gb/s): on another NUMA node")
    assert "socket to socket" in far.advice
    assert rows["gpu 0000:16:11.0"].status is Status.OKAY
    assert "NUMA 1: mlx5_1/ens1 (down)" in rows["network cards"].found


def test_levels_of_nearness(tmp_path):
    tree = Tree(tmp_path)
    tree.file("/sys/devices/system/node/node1/cpulist", "")
    tree.interface("ens0", tree.function("pci0000:16/0000:16:02.0/0000:17:00.0", 0))
    tree.gpu("pci0000:16/0000:16:04.0/0000:18:00.0", 0)
    tree.gpu("pci0000:40/0000:40:02.0/0000:41:00.0", 0)
    tree.gpu("pci0000:c9/0000:c9:02.0/0000:ca:00.0", -1)
    rows = tree.rows()
    assert "on the same host bridge" in rows["gpu 0000:18:00.0"].found
    assert "on the same NUMA node" in rows["gpu 0000:41:00.0"].found
    assert "NUMA unknown" in rows["gpu 0000:ca:00.0"].found
    assert "nvidia-smi topo" in rows["gpu 0000:ca:00.0"].advice


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None, "devices": 0}, "built without CUDA"),
        ({"torch": "2.13.0", "cuda": "13.0", "devices": 0}, "can use none"),
        ({"torch": "2.13.0", "error": "RuntimeError: out of memory"}, "out of memory"),
        ({"torch": "2.13.0", "cuda": "13.0", "devices": 2, "pinned": True, "registered": 2}, "code 2"),
        ({"torch": "2.13.0", "cuda": "13.0", "devices": 2, "pinned": False, "registered": 0}, "pinned: False"),
        (RuntimeError("no answer within 120 s"), "could not be examined: RuntimeError: no answer within 120 s"),
    ],
)
def test_memory_that_cannot_be_pinned(node, answer, words):
    node.pinned = answer
    row = node.rows()["pinned memory"]
    assert (row.status, words in row.found) == (Status.WARN, True), row.found
