"""What training can do without: whatever fails there costs only itself, and people hear of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("adaptra")


HEALED_AFTER = 10
"""Successes in a row after which a part that failed is said to work again, unless the caller knows better."""


class Parts:
    """The optional parts of a rank's work, by name, and which of them fail at present.

    A part that fails is told of once, with the reason, and once more when it works again; one that fails now and then is
    told of no more often.

    Args:
        tell: `(part, "lost" or "healed", text)`. May raise: then the log has the line all the same.
    """

    def __init__(self, tell: Callable[[str, str, str], None]) -> None:
        self._tell = tell
        self._failures: Counter[str] = Counter()  # in a row
        self._lost: dict[str, int] = {}  # told of as lost -> successes in a row since

    def failures(self, part: str) -> int:
        """How often it has failed in a row."""
        return self._failures[part]

    def is_lost(self, part: str) -> bool:
        """Whether people have been told that it fails, and not yet that it works again."""
        return part in self._lost

    def lost(self, part: str, instead: str, error: Exception | str) -> None:
        """A part has failed. `instead`: what happens without it."""
        self._failures[part] += 1
        first = part not in self._lost
        self._lost[part] = 0
        why = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if not isinstance(error, str):  # not foreseen: whoever mends it needs to know where
            logger.log(logging.WARNING if first else logging.DEBUG, "%s failed", part, exc_info=error)
        if first:
            self.tell(part, "lost", f"{instead}: {why}"[:500])

    def works(self, part: str, enough: int = HEALED_AFTER) -> None:
        """A part has done its work; `enough` such successes in a row are news if it was lost."""
        self._failures.pop(part, None)
        if part in self._lost:
            self._lost[part] += 1
            if self._lost[part] >= enough:
                del self._lost[part]
                self.tell(part, "healed", "it works again")

    @contextmanager
    def guard(self, part: str, instead: str) -> Iterator[None]:
        """An exception in the block ends the block and nothing else."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is: training needs none of this
            self.lost(part, instead, error)
        else:
            self.works(part)

    def tell(self, part: str, state: str, text: str) -> None:
        """News of a part, for people. Never raises."""
        try:
            self._tell(part, state, text)
        except Exception:
            logger.exception("%s is %s (%s), which cannot be reported", part, state, text)
