"""A node without RDMA and without GPUs: limits, memory, kernel, packages."""

from __future__ import annotations

import errno
import resource

import pytest

from adaptra_plugin.config import parse_config
from adaptra_plugin.doctor import Needs, Row, Status, examine
from adaptra_plugin.doctor.machine import UNLIMITED
from tests.doctor.machines import GIB, Tree


@pytest.fixture
def node(tmp_path) -> Tree:
    tree = Tree(tmp_path)
    del tree.versions["pyverbs"]
    tree.pyverbs = {"error": "ModuleNotFoundError: No module named 'pyverbs'"}
    tree.interface("eth0", tree.function("pci0000:00/0000:00:03.0", -1))
    return tree


def test_no_rdma_is_a_warning_and_nothing_else(node):
    rows = node.rows()
    assert [row.check for row in rows.values() if row.status is not Status.OKAY] == ["rdma"]
    assert rows["rdma"].status is Status.WARN
    assert rows["rdma"].found == "no RDMA devices, TCP and shared memory will be used"
    assert rows["pyverbs"].found.endswith("not needed here")
    assert rows["network cards"].found == "NUMA 0: eth0 (up, 100 Gb/s)"
    assert "no GPU" in rows["pinned memory"].found


def test_a_small_memlock_is_no_failure_here(node):
    node.limits[resource.RLIMIT_MEMLOCK] = (64 << 10, 64 << 10)
    row = node.rows()["memlock"]
    assert (row.status, "soft 64 KiB" in row.found, "no RDMA port is active" in row.found) == (Status.WARN, True, True)


def test_rdma_that_is_insisted_on_is_a_failure(node):
    config = parse_config({})
    insisting = config.transport.model_copy(update={"rail": "rdma"})
    needs = Needs(config.model_copy(update={"transport": insisting}), 1)
    assert node.rows(needs)["rdma"].status is Status.FAIL


def test_nothing_at_all_gives_rows_and_no_error(tmp_path):
    tree = Tree(tmp_path / "machine")
    tree.root = tmp_path / "empty"
    tree.root.mkdir()
    rows = tree.rows()
    assert rows["staging memory"].status is Status.WARN
    assert rows["network cards"].status is Status.WARN
    assert {row.status for row in rows.values()} <= {Status.OKAY, Status.WARN}


def test_a_check_that_breaks_is_a_row_and_keeps_what_it_had(node):
    def two_things(machine, needs):
        yield Row("first", Status.OKAY, "fine")
        raise ZeroDivisionError("by zero")

    rows = examine(node.machine(), Needs(), [two_things])
    assert rows[0].check == "first"
    assert rows[1].check == "two things"
    assert (rows[1].status, rows[1].found) == (Status.WARN, "could not be examined: ZeroDivisionError: by zero")


@pytest.mark.parametrize(
    ("ring_mib", "ranks", "status"),
    [(64, 2, Status.OKAY), (3200, 1, Status.OKAY), (3201, 1, Status.WARN), (6400, 1, Status.WARN),
     (6401, 1, Status.FAIL), (3201, 2, Status.FAIL)],
)  # fmt: skip
def test_rings_of_all_ranks_against_100_gib_available(node, ring_mib, ranks, status):
    needs = Needs(parse_config({"transport": {"ring_mib": ring_mib}}), ranks)
    row = node.rows(needs)["staging memory"]
    assert row.status is status
    assert "100 GiB available" in row.found
    assert ("ring_mib" in row.advice) is (status is not Status.OKAY)


def test_the_tightest_control_group_counts(node):
    node.file("/proc/self/cgroup", "0::/slurm/job")
    node.file("/sys/fs/cgroup/slurm/memory.max", str(GIB))
    node.file("/sys/fs/cgroup/slurm/memory.current", str(GIB * 3 // 4))
    node.file("/sys/fs/cgroup/memory.max", str(64 * GIB))
    node.file("/sys/fs/cgroup/slurm/job/memory.max", "max")
    row = node.rows()["staging memory"]
    assert (row.status, "256 MiB free of 1 GiB" in row.found) == (Status.FAIL, True)
    # page cache is given back when it is needed
    node.file("/sys/fs/cgroup/slurm/memory.stat", f"anon 1\ninactive_file {GIB * 3 // 4}")
    row = node.rows(Needs(parse_config({"transport": {"ring_mib": 32}})))["staging memory"]
    assert (row.status, "1 GiB free of 1 GiB" in row.found) == (Status.OKAY, True)


def test_control_groups_of_version_1(node):
    node.file("/proc/self/cgroup", "4:memory:/job\n1:cpu,cpuacct:/job")
    node.file("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    node.file("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(GIB))
    node.file("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(GIB // 2))
    node.file("/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "150000")
    node.file("/sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000")
    rows = node.rows()
    assert "512 MiB free of 1 GiB" in rows["staging memory"].found
    assert "control group grants 1.5" in rows["processors"].found
    assert rows["processors"].status is Status.WARN


@pytest.mark.parametrize(
    ("mask", "quota", "status", "words"),
    [
        ({0, 1, 2, 3}, "max 100000", Status.OKAY, "4 in the affinity mask (0-3)"),
        ({0, 1, 8}, "max 100000", Status.WARN, "3 in the affinity mask (0-1,8)"),
        ({0, 1, 2, 3}, "300000 100000", Status.WARN, "control group grants 3"),
        ({0, 1, 2, 3}, "400000 100000", Status.OKAY, "control group grants 4"),
    ],
)
def test_two_processors_a_rank(node, mask, quota, status, words):
    node.affinity = mask
    node.file("/sys/fs/cgroup/cpu.max", quota)
    row = node.rows()["processors"]
    assert (row.status, words in row.found) == (status, True), row.found
    assert row.found.startswith("16 online")


@pytest.mark.parametrize(
    ("soft", "status"),
    [(UNLIMITED, Status.OKAY), (281, Status.FAIL), (282, Status.WARN), (537, Status.WARN), (538, Status.OKAY)],
)
def test_open_files(node, soft, status):
    node.limits[resource.RLIMIT_NOFILE] = (soft, UNLIMITED)
    row = node.rows()["open files"]
    assert (row.status, "hard unlimited" in row.found) == (status, True)


def test_a_kernel_feature_that_is_forbidden(node):
    def forbidden():
        raise OSError(errno.EPERM, "Operation not permitted")

    node.features["pidfd_open"] = forbidden
    row = node.rows()["kernel"]
    assert (row.status, "pidfd_open (Linux 5.3 on) does not work" in row.found) == (Status.FAIL, True)
    assert "seccomp" in row.advice
    node.features["memfd_create"] = forbidden
    assert node.rows()["shared memory"].status is Status.FAIL


def test_dockers_small_shm_is_worth_a_word(node):
    node.shm = 64 << 20
    row = node.rows()["shared memory"]
    assert (row.status, "--shm-size" in row.advice) == (Status.WARN, True)


def test_huge_pages_that_hold_most_of_the_memory(node):
    memory = "MemTotal: 104857600 kB\nMemAvailable: 30000000 kB\nHugePages_Free: 7\nHugepagesize: 2048 kB\n"
    node.file("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    node.file("/proc/meminfo", memory + "HugePages_Total: 30720")
    row = node.rows()["huge pages"]
    assert (row.status, "60% of the memory" in row.found) == (Status.WARN, True)
    assert row.found.startswith("30720 reserved (7 free) of 2 MiB; transparent: madvise, in shared memory: unknown")
    node.file("/proc/meminfo", memory + "HugePages_Total: 100")
    assert node.rows()["huge pages"].status is Status.OKAY


@pytest.mark.parametrize(
    ("versions", "check", "status", "words"),
    [
        ({"deepspeed": "0.15.4"}, "deepspeed", Status.FAIL, "0.15.4, supported: >=0.16,<0.20: outside of the range"),
        ({"deepspeed": "0.20.0"}, "deepspeed", Status.FAIL, "outside"),
        ({"deepspeed": "0.19.9.dev1"}, "deepspeed", Status.OKAY, "0.19.9.dev1"),
        ({"deepspeed": None}, "deepspeed", Status.FAIL, "nothing to plug into"),
        ({"torch": "2.3.1"}, "torch", Status.FAIL, "outside"),
        ({"torch": None}, "torch", Status.FAIL, "the plug-in needs it"),
        ({"xxhash": None}, "xxhash", Status.FAIL, "the plug-in needs it"),
        ({"wandb": "0.16.0"}, "wandb", Status.WARN, "outside"),
        ({"megatron-core": "0.14.0"}, "megatron-core", Status.OKAY, "0.14.0, supported: >=0.14,<0.20"),
        ({"megatron-core": "0.13.0"}, "megatron-core", Status.WARN, "outside"),
    ],
)
def test_versions(node, versions, check, status, words):
    node.versions.update(versions)
    row = node.rows()[check]
    assert (row.status, words in row.found) == (status, True), row.found


@pytest.mark.parametrize(
    ("soft", "group", "status"),
    [
        (UNLIMITED, None, Status.OKAY),
        (1000, None, Status.OKAY),
        (100, None, Status.WARN),
        (UNLIMITED, ("1000", "100"), Status.OKAY),
        (UNLIMITED, ("1000", "950"), Status.WARN),
        (UNLIMITED, ("max", "950"), Status.OKAY),
    ],
)
def test_processes(node, soft, group, status):
    node.limits[resource.RLIMIT_NPROC] = (soft, UNLIMITED)
    if group is not None:
        node.file("/sys/fs/cgroup/pids.max", group[0])
        node.file("/sys/fs/cgroup/pids.current", group[1])
    row = node.rows()["processes"]
    assert row.status is status and "2 ranks on this node: about 128" in row.found
    assert bool(row.advice) is (status is Status.WARN)


@pytest.mark.parametrize(("soft", "status"), [(UNLIMITED, Status.OKAY), (1 << 30, Status.OKAY), (4096, Status.FAIL)])
def test_file_size(node, soft, status):
    node.limits[resource.RLIMIT_FSIZE] = (soft, UNLIMITED)
    assert node.rows()["file size"].status is status


def test_how_the_plug_in_does_without_what_is_optional(node):
    rows = node.rows()
    for name, words in {"numba": "uncompiled", "ortools": "not refined", "matplotlib": "no pictures"}.items():
        assert rows[name].status is Status.OKAY
        assert rows[name].found.startswith("not installed: ") and words in rows[name].found
        assert "pip install 'adaptra-plugin[" in rows[name].found


def test_wandb_that_the_configuration_asks_for(node):
    needs = Needs(parse_config({"report": {"wandb": "on"}}))
    assert node.rows(needs)["wandb"].status is Status.WARN
    assert node.rows()["wandb"].status is Status.OKAY


def test_the_wrong_apex(node, tmp_path):
    assert node.rows()["apex"].status is Status.OKAY
    node.versions["apex"], node.apex = "0.9.10.dev0", tmp_path / "apex"
    node.apex.mkdir()
    row = node.rows()["apex"]
    assert (row.status, "PyPI's apex is another product" in row.found) == (Status.WARN, True)
    assert "pip uninstall apex" in row.advice
    (node.apex / "normalization").mkdir()
    assert node.rows()["apex"].found == "NVIDIA's Apex 0.9.10.dev0 is installed; not needed"


def test_an_old_python(node):
    node.python = (3, 9, 18)
    assert node.rows()["python"].status is Status.FAIL
