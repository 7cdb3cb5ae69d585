"""Limits of the control groups (v1 and v2) that this process is in: in a container they count, not the machine's numbers."""

from __future__ import annotations

from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.shortage import groups

V1_UNLIMITED = 1 << 60
"""v1 writes a number near 2**63 where there is no limit."""


def memory_free(machine: Machine) -> tuple[int, int] | None:
    """Limit and free bytes of the tightest group, page cache that can be given back counted as free; None: no limit."""
    found = []
    for folder, version in groups(machine.text, "memory"):
        top, used = (
            ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        limit = machine.number(f"{folder}/{top}")  # "max" is no number
        if limit is None or limit >= V1_UNLIMITED:
            continue
        cache = _cache(machine, f"{folder}/memory.stat", "inactive_file" if version == 2 else "total_inactive_file")
        found.append((limit, limit - (machine.number(f"{folder}/{used}") or 0) + cache))
    return min(found, key=lambda pair: pair[1]) if found else None


def cpu_quota(machine: Machine) -> float | None:
    """CPUs that the tightest group may use; None: no limit."""
    found = []
    for folder, version in groups(machine.text, "cpu"):
        if version == 2:
            words = (machine.text(f"{folder}/cpu.max") or "").split()
        else:
            words = [str(machine.number(f"{folder}/cpu.cfs_{name}_us")) for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _cache(machine: Machine, place: str, name: str) -> int:
    for line in (machine.text(place) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
