"""``adaptra doctor``: is this node ready, row by row, with the numbers and what to do about them.

A check is a function that takes the machine and the job's needs and yields rows (`Check`); `examine` runs a list of
them. Checks see the machine only through `Machine`, whose root folder and look-ups can be replaced. What asks more than
this node (its rails to a peer) is a list of checks of its own, built around its arguments in a module of its own and given
to `examine` after `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adaptra_plugin.doctor import limits, memory, pinned, rdma, software, topology, verbs
from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status

__all__ = ["CHECKS", "Check", "Machine", "Needs", "Row", "Status", "examine"]

Check = Callable[[Machine, Needs], Iterator[Row]]
"""Its name is that of its row, `_` for a space, and stands for it if it fails."""

CHECKS: tuple[Check, ...] = (
    software.python,
    software.packages,
    software.apex,
    limits.kernel,
    limits.processors,
    limits.open_files,
    limits.processes,
    limits.file_size,
    memory.staging_memory,
    memory.shared_memory,
    memory.memlock,
    memory.huge_pages,
    pinned.pinned_memory,
    topology.network_cards,
    topology.interfaces,
    topology.gpus,
    rdma.rdma,
    verbs.pyverbs,
)
"""What is examined, in the order of the rows."""


def examine(machine: Machine, needs: Needs, checks: Sequence[Check] = CHECKS) -> list[Row]:
    """The rows of all checks. Raises nothing: a check that fails itself becomes a WARN row with the reason."""
    return [row for check in checks for row in _guarded(check, machine, needs)]


def _guarded(check: Check, machine: Machine, needs: Needs) -> list[Row]:
    """The rows of a check; if it raises, those it had made and a WARN row with the reason."""
    rows = []
    try:
        for row in check(machine, needs):
            rows.append(row)
    except Exception as error:  # noqa: BLE001 - no machine is so odd that its operator should read a traceback
        name = check.__name__.replace("_", " ")
        advice = "look at this by hand; the other rows hold"
        rows.append(Row(name, Status.WARN, f"could not be examined: {type(error).__name__}: {error}", advice))
    return rows
