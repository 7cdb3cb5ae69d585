"""Pauses between attempts."""

from __future__ import annotations


class Backoff:
    """Pauses that double, from `first_s` to `longest_s`."""

    def __init__(self, first_s: float, longest_s: float = float("inf")) -> None:
        self.pause_s = first_s
        """The next pause (s)."""
        self._first_s = first_s
        self._longest_s = longest_s

    def next(self) -> float:
        """The pause to make now (s). The one after it is twice as long."""
        pause = self.pause_s
        self.pause_s = min(2 * pause, self._longest_s)
        return pause

    def reset(self) -> None:
        """It worked: the next pause is the first one again."""
        self.pause_s = self._first_s
