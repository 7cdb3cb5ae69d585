"""Memory: room for the staging rings, memory that two processes share, memory that an RDMA card may be given."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from adaptra_plugin.doctor import cgroup
from adaptra_plugin.doctor.machine import UNLIMITED, Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rdma import usable
from adaptra_plugin.doctor.rows import Row, Status, gib

CAP_IPC_LOCK = 14
"""Bit of the capability with which RLIMIT_MEMLOCK does not count."""
TIGHT = 0.5
"""Rings that take more than this share of the free memory leave too little for the job itself."""
MEMLOCK_ADVICE = (
    'add "* - memlock unlimited" to /etc/security/limits.conf and log in again; services (Slurm): LimitMEMLOCK=infinity; '
    "Docker: --ulimit memlock=-1"
)


def staging_memory(machine: Machine, needs: Needs) -> Iterator[Row]:
    """The rings of all ranks against what is free on the machine and in the control group."""
    available = machine.kib("/proc/meminfo", "MemAvailable")
    group = cgroup.memory_free(machine)
    free = min([n for n in (available, group[1] if group else None) if n is not None], default=None)
    if free is None:
        yield Row("staging memory", Status.WARN, "/proc/meminfo says nothing about free memory", "look at `free -m`")
        return
    room = f"{gib(available)} available" if available is not None else "available memory unknown"
    room += f", control group {gib(group[1])} free of {gib(group[0])}" if group else ", no limit by a control group"
    ranks = f", {needs.ranks} ranks" if needs.ranks > 1 else ""
    found = f"rings need {needs.rings()}{ranks}: {gib(needs.node_bytes)}; {room}"
    advice = "set adaptra.transport.ring_mib lower (a ring must hold the longest message) or free memory"
    if needs.node_bytes > free:
        yield Row("staging memory", Status.FAIL, found, advice)
    elif needs.node_bytes > TIGHT * free:
        yield Row("staging memory", Status.WARN, f"{found}: {needs.node_bytes / free:.0%} of what is free", advice)
    else:
        yield Row("staging memory", Status.OKAY, found)


def shared_memory(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Memory files (memfd); /dev/shm is said too, because NCCL and data loaders need it."""
    try:
        total, _, free = machine.disk(machine.path("/dev/shm"))
        shm = f"/dev/shm: {gib(free)} free of {gib(total)}"
    except OSError as error:
        total, shm = None, f"/dev/shm: {error.strerror}"
    try:
        machine.features["memfd_create"]()
    except (OSError, AttributeError) as error:
        found = f"memfd_create does not work: {error}; {shm}"
        yield Row("shared memory", Status.FAIL, found, "allow memfd_create in the container's seccomp profile")
        return
    found = f"memfd works (it counts as memory of the control group, not of /dev/shm); {shm}"
    if total is None or total <= 64 << 20:  # Docker's default
        advice = "NCCL and data loaders need more /dev/shm: Docker: --shm-size=16g or --ipc=host"
        yield Row("shared memory", Status.WARN, found, advice)
    else:
        yield Row("shared memory", Status.OKAY, found)


def memlock(machine: Machine, needs: Needs) -> Iterator[Row]:
    """What a process may register with a card. Pinning by CUDA is not bound by this limit."""
    soft, hard = machine.limit(resource.RLIMIT_MEMLOCK)
    words = [("unlimited" if n == UNLIMITED else gib(n)) for n in (soft, hard)]
    found = f"soft {words[0]}, hard {words[1]}; rings need {needs.rings()}"
    counts = usable(machine, needs)
    if soft == UNLIMITED or soft >= needs.rank_bytes:
        yield Row("memlock", Status.OKAY, found)
    elif _may_lock(machine):
        advice = "other users have only the limit: run the doctor as the user of the job" if counts else ""
        yield Row("memlock", Status.OKAY, f"{found}; CAP_IPC_LOCK is held, so the limit does not count", advice)
    elif not counts:
        why = "the configuration switches RDMA off" if not needs.wants_rdma else "no RDMA port is active"
        yield Row("memlock", Status.WARN, f"{found}; not needed now: {why}", f"before RDMA is used: {MEMLOCK_ADVICE}")
    elif hard == UNLIMITED or hard >= needs.rank_bytes:
        advice = f"`ulimit -l {words[1] if hard == UNLIMITED else hard >> 10}` before the job starts"
        yield Row("memlock", Status.FAIL, f"{found}: the rings cannot be registered with the card", advice)
    else:
        yield Row("memlock", Status.FAIL, f"{found}: the rings cannot be registered with the card", MEMLOCK_ADVICE)


def _may_lock(machine: Machine) -> bool:
    """Whether the kernel's RDMA code waives the limit: it asks for the capability in the first user namespace."""
    held = int(machine.fields("/proc/self/status").get("CapEff", "0"), 16)
    return bool(held >> CAP_IPC_LOCK & 1) and (machine.text("/proc/self/uid_map") or "").split() == [
        "0",
        "0",
        "4294967295",
    ]


def huge_pages(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Not needed; said because reserved pages are lost to everything else, and transparent ones make registering faster."""
    fields = machine.fields("/proc/meminfo")
    total, size = fields.get("HugePages_Total", ""), machine.kib("/proc/meminfo", "Hugepagesize")
    if not total.isdigit() or size is None:
        yield Row("huge pages", Status.OKAY, "the kernel has none; not needed")
        return
    folder = "/sys/kernel/mm/transparent_hugepage"
    modes = {name: _chosen(machine.text(f"{folder}/{name}")) for name in ("enabled", "shmem_enabled")}
    found = (
        f"{total} reserved ({fields.get('HugePages_Free', '?')} free) of {gib(size)}; transparent: {modes['enabled']}, "
        f"in shared memory: {modes['shmem_enabled']}; not needed"
    )
    memory = machine.kib("/proc/meminfo", "MemTotal")
    if memory and int(total) * size > memory / 2:
        yield Row("huge pages", Status.WARN, f"{found}, but they hold {int(total) * size / memory:.0%} of the memory", (
            "the rings cannot use reserved pages: lower vm.nr_hugepages unless another program needs them"
        ))  # fmt: skip
    else:
        yield Row("huge pages", Status.OKAY, found)


def _chosen(text: str | None) -> str:
    """The bracketed word of `always [madvise] never`."""
    words = [word for word in (text or "").split() if word.startswith("[")]
    return words[0].strip("[]") if words else "unknown"
