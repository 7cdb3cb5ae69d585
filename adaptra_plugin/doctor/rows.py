"""What a check answers, and how a check is run."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptra_plugin.doctor.machine import Machine
    from adaptra_plugin.doctor.needs import Needs


class Status(str, enum.Enum):
    OKAY = "OKAY"
    WARN = "WARN"
    """The job runs, but slower or with less than it could have; or the check itself could not be made."""
    FAIL = "FAIL"
    """To be put right first: the job will not run, or not with what this node has for it."""


@dataclass(frozen=True)
class Row:
    """One answer: `found` has the numbers, `advice` what to do (empty: nothing)."""

    check: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return {"check": self.check, "status": self.status.value, "found": self.found, "advice": self.advice}


Check = Callable[["Machine", "Needs"], Iterator[Row]]
"""Its name is that of its row, `_` for a space, and stands for it if it fails."""


def guarded(check: Check, machine: Machine, needs: Needs) -> list[Row]:
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


def gib(nbytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes / size < 1000 else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"
