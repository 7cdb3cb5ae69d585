"""Actions: the unit in which everything is planned, simulated, executed and drawn.

The grammar is that of torch.distributed.pipelining: stage, kind, microbatch; ``2F0`` is stage 2, forward, microbatch 0.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import lru_cache

from adaptra_plugin.errors import PlanError


class Kind(str, enum.Enum):
    """What an action computes for one microbatch on one stage."""

    FORWARD = "F"
    BACKWARD_INPUT = "I"  # with respect to the stage's input
    BACKWARD_WEIGHT = "W"  # with respect to the stage's parameters
    FULL_BACKWARD = "B"  # both, fused

    def __str__(self) -> str:
        return self.value


KINDS = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.FULL_BACKWARD)
"""Position in this tuple is the code of the kind in every integer table of this package."""

CODE = {kind: code for code, kind in enumerate(KINDS)}
_PATTERN = re.compile(r"^\s*(\d+)([FIWB])(\d+)\s*$")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One computation of one microbatch on one stage; ``str(Action(2, Kind.FORWARD, 0)) == "2F0"``."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads ``2F0``. Raises PlanError for anything else."""
        found = _PATTERN.match(text) if len(text) <= 64 else None  # beyond: no number of a stage, whatever it says
        if not found:
            raise PlanError(f"{text[:64]!r} is not an action: expected <stage><F|I|W|B><microbatch>, for example 2F0")
        return intern(int(found[1]), CODE[Kind(found[2])], int(found[3]))


@lru_cache(maxsize=1 << 18)
def intern(stage: int, code: int, microbatch: int) -> Action:
    """The action with kind ``KINDS[code]``; shared, because large schedules name the same actions over and over."""
    return Action(stage, KINDS[code], microbatch)
