"""Limits of the process: processors, open files, kernel features."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from adaptra_plugin.doctor import cgroup
from adaptra_plugin.doctor.machine import UNLIMITED, Machine
from adaptra_plugin.doctor.needs import NEIGHBOURS, Needs
from adaptra_plugin.doctor.rows import Row, Status, gib
from adaptra_plugin.shortage import tasks

CPUS_PER_RANK = 2
"""One for the training thread, one for the proxy."""
OTHER_FILES = 256
"""Descriptors that torch, the host, its data loaders and W&B have open (a rank of the demo: about 120)."""
TASKS_PER_RANK = 64
"""Threads of torch, of its data loaders and of W&B, and the proxy: a guess on the safe side."""
MANY_RANKS = 256
"""Rank 0 holds a connection with every rank; a limit that ends below so many ranks is worth a word."""
SINCE = {"eventfd": "2.6.22", "memfd_create": "3.17", "pidfd_open": "5.3"}


def kernel(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Tries each feature: a version says nothing about seccomp filters or backports."""
    missing = {}
    for name, works in machine.features.items():
        try:
            works()
        except (OSError, AttributeError) as error:
            missing[name] = str(error)
    release = machine.text("/proc/sys/kernel/osrelease") or "of unknown version"
    if not missing:
        yield Row("kernel", Status.OKAY, f"Linux {release}; {', '.join(machine.features)} work")
        return
    words = "; ".join(f"{name} (Linux {SINCE.get(name, '?')} on) does not work: {why}" for name, why in missing.items())
    advice = f"use a newer kernel, or allow {', '.join(missing)} in the container's seccomp profile"
    yield Row("kernel", Status.FAIL, f"Linux {release}; {words}", advice)


def processors(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Processors in the affinity mask, and those that the control group grants."""
    mask = machine.affinity()
    online = _count(machine.text("/sys/devices/system/cpu/online"))
    quota = cgroup.cpu_quota(machine)
    usable = min(len(mask), quota) if quota is not None else len(mask)
    found = f"{online or '?'} online, {len(mask)} in the affinity mask ({_ranges(mask)})"
    found += f", control group grants {quota:g}" if quota is not None else ""
    needed = CPUS_PER_RANK * needs.ranks
    found += f"; {needs.ranks} rank{'s' if needs.ranks > 1 else ''} on this node: {needed} at least"
    if usable < needed:
        advice = (
            f"give every rank {CPUS_PER_RANK} processors (training and proxy): widen the mask (Slurm: --cpus-per-task), "
            "or raise the container's quota"
        )
        yield Row("processors", Status.WARN, found, advice)
    else:
        yield Row("processors", Status.OKAY, found)


def open_files(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Descriptors: data connections and a service connection per neighbour, and on rank 0 one connection per rank."""
    soft, hard = machine.limit(resource.RLIMIT_NOFILE)
    words = [("unlimited" if n == UNLIMITED else str(n)) for n in (soft, hard)]
    # a ring in shared memory has a descriptor at each end of the proxy
    needed = OTHER_FILES + 3 * needs.connections + NEIGHBOURS
    found = f"soft {words[0]}, hard {words[1]}; a rank needs about {needed}"
    advice = 'raise it: `ulimit -n`, "* - nofile 65536" in /etc/security/limits.conf, LimitNOFILE= of the service'
    if soft == UNLIMITED:
        yield Row("open files", Status.OKAY, found)
    elif soft < needed:
        yield Row("open files", Status.FAIL, found, advice)
    else:
        spare = soft - needed
        status = Status.WARN if spare < MANY_RANKS else Status.OKAY
        found += f", rank 0 one more for every rank: enough for {spare} ranks"
        yield Row("open files", status, found, advice if status is Status.WARN else "")


def processes(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Processes and threads: of the user (which root may exceed) and of the control group."""
    soft, _ = machine.limit(resource.RLIMIT_NPROC)
    group = tasks(machine.text)
    needed = TASKS_PER_RANK * needs.ranks
    found = "no limit of this user" if soft == UNLIMITED else f"this user may have {soft}"
    found += (
        "; no limit by a control group"
        if group is None
        else f"; the control group may have {group[0]} and has {group[1]}"
    )
    found += f"; {needs.ranks} rank{'s' if needs.ranks > 1 else ''} on this node: about {needed}"
    left = min(
        [
            n
            for n in (None if soft == UNLIMITED else soft, None if group is None else group[0] - group[1])
            if n is not None
        ],
        default=needed,
    )
    advice = "raise it: `ulimit -u`, nproc in /etc/security/limits.conf; Docker: --pids-limit; Kubernetes: podPidsLimit"
    yield Row("processes", Status.WARN, found, advice) if left < needed else Row("processes", Status.OKAY, found)


def file_size(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Counts for shared memory too, which the staging rings are."""
    soft, _ = machine.limit(resource.RLIMIT_FSIZE)
    if soft == UNLIMITED:
        yield Row("file size", Status.OKAY, "no limit")
    elif soft < needs.ring_bytes:
        found = f"{gib(soft)}, shared memory included; a staging ring has {gib(needs.ring_bytes)}"
        yield Row("file size", Status.FAIL, found, "`ulimit -f unlimited`, fsize in /etc/security/limits.conf")
    else:
        yield Row("file size", Status.OKAY, f"{gib(soft)}; a staging ring has {gib(needs.ring_bytes)}")


def _count(text: str | None) -> int:
    """Processors in `0-3,8`."""
    total = 0
    for part in (text or "").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += int(last or first) - int(first) + 1
    return total


def _ranges(numbers: set[int]) -> str:
    """`0-3,8` of {0, 1, 2, 3, 8}."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
