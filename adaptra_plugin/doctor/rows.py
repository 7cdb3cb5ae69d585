"""What a check answers."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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


def gib(nbytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes / size < 1000 else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"
