"""What a trainer says after each iteration, and how whoever launched it reads that."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

_LINE = re.compile(r"adaptra-progress (\d+) (\S+) (\d+\.\d)$")


class Progress(NamedTuple):
    """One finished iteration: how many are done, the loss, and the iteration's time in ms."""

    done: int
    loss: float
    ms: float

    def say(self) -> None:
        """Print it in a single write: the other ranks and their logs share this pipe, and would come between text and newline."""
        sys.stdout.write(f"adaptra-progress {self.done} {self.loss:.4f} {self.ms:.1f}\n")
        sys.stdout.flush()


def read(line: str) -> Progress | None:
    """What ``line`` of a launcher's output says; another process may have left half a line of its own before it."""
    found = _LINE.search(line.rstrip("\n"))
    return Progress(int(found[1]), float(found[2]), float(found[3])) if found is not None else None
