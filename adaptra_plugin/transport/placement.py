"""Where threads run: CPUs for the proxy, and how long a waiting thread may spin."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

_NODES = Path("/sys/devices/system/node")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_FEW_CPUS = 4
_MOST_CPUS = 8192  # that Linux can have
SPIN_US = 20


def spin_s(configured: int | Literal["auto"]) -> float:
    """How long a reader tries again before it sleeps (s); `auto`: not where CPUs are few, others need them."""
    if configured == "auto":
        return 0.0 if len(os.sched_getaffinity(0)) <= _FEW_CPUS else SPIN_US / 1e6
    return configured / 1e6


def proxy_cpus(configured: Sequence[int] | Literal["auto"] | None) -> list[int] | None:
    """The CPUs for the proxy; None: where the system puts it. Called on the thread that trains.

    `auto`: those of this process on the NUMA node where this thread runs, without the CPUs that this thread is pinned
    to if there are others. A process whose threads start on a single core has not been given that core for all it does:
    there, those of the node count that the system lets the process have. Several cores are its share of the node: the
    others are somebody else's.
    """
    if configured is None:
        return None
    if configured != "auto":
        return sorted(configured)
    try:
        process, thread = os.sched_getaffinity(os.getpid()), os.sched_getaffinity(0)
        near = _node_of(thread)
        if process == thread and _one_core(thread):
            process |= allowed_cpus()
    except (OSError, ValueError):
        return None
    chosen = process & near
    if len(process) > 2 and thread < process and chosen - thread:
        chosen -= thread
    return sorted(chosen) if chosen and not chosen == process == thread else None


def allowed_cpus() -> set[int]:
    """Where the system (a cgroup, a container) lets threads of this process run, whatever they are pinned to now."""
    found: set[int] = set()

    def look() -> None:
        try:
            os.sched_setaffinity(0, range(_MOST_CPUS))  # of this thread; the kernel leaves out what it does not allow
        except OSError:
            pass  # a sandbox that forbids it
        found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=look, name="adaptra-cpus", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there is no room for one more thread: whoever really needs one will say so
        return os.sched_getaffinity(0)
    thread.join()
    return found


def _one_core(cpus: set[int]) -> bool:
    """Whether these are one CPU, or hardware threads of one core."""
    if len(cpus) == 1:
        return True
    path = _TOPOLOGY / f"cpu{min(cpus)}" / "topology" / "thread_siblings_list"
    return path.exists() and cpus <= parse_cpus(path.read_text())


def _node_of(cpus: Iterable[int]) -> set[int]:
    """All CPUs of the NUMA node that holds all of `cpus`; ValueError if there is none."""
    wanted = set(cpus)
    for path in _NODES.glob("node[0-9]*/cpulist"):
        found = parse_cpus(path.read_text())
        if wanted <= found:
            return found
    raise ValueError("the CPUs lie on several nodes")


def parse_cpus(text: str) -> set[int]:
    """CPUs in the kernel's way of writing them: `0-3,8`. Raises ValueError."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
