"""What is told of the rails to a peer, and when."""

from __future__ import annotations

from collections.abc import Callable

from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.proxy.rails.base import Rail

HOLD_S = 2.0
"""Longest time for which the end of a rail is kept back."""


class RailNews:
    """Steps in the life of a peer's rails, on their way to `tell(rail, state, why)`.

    A peer that dies takes all its rails with it, within a moment: that is one piece of news, of the peer. So the end of a
    rail is told once the peer has shown that it lives, which takes a round trip over another rail, or a new connection; or
    after `HOLD_S` without a word of it.
    """

    def __init__(self, loop: Loop, tell: Callable[[Rail, State, str], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._held: list[tuple[Rail, State, str]] = []
        self._since = 0.0
        self._timer: Timer | None = None

    def step(self, rail: Rail, state: State, why: str) -> bool:
        """A rail has come into this state. True if the peer should be asked for a sign of life."""
        if state is not State.PAUSED:
            self._tell(rail, state, why)
            return False
        self._held.append((rail, state, why))
        self._since = self._loop.clock()
        if self._timer is None:
            self._timer = self._loop.call_later(HOLD_S, self.alive)
        return True

    def answered(self, sent: float) -> None:
        """The peer has answered to what left at `sent` (s, this clock)."""
        if self._held and sent >= self._since:
            self.alive()

    def alive(self) -> None:
        """The peer lives, so what has ended is news of rails."""
        held = self._held
        self.drop()
        for item in held:
            self._tell(*item)

    def drop(self) -> None:
        """It does not, or nobody wants to know. Idempotent."""
        self._held = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
