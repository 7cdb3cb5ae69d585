"""How far a rail is to be trusted. Pure: times come in, states go out.

healthy --late--> suspect --late again, while others work--> paused --pause is over--> probing --answer--> healthy
   ^                 |                                          ^                         |
   '---- answer -----'                                          '------- no answer -------'  (pause grows)
"""

from __future__ import annotations

import enum

from adaptra_plugin.backoff import Backoff

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
CLEAN_S = 10.0
"""A rail that has been healthy for so long starts from the first pause again."""

STEADY_S = 0.25


class State(enum.Enum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    PAUSED = "paused"
    PROBING = "probing"


class Health:
    """State of one rail over all its connections; `until` is when a pause ends (s)."""

    def __init__(self) -> None:
        self.state = State.PROBING  # no connection yet
        self.until = 0.0
        self._pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._since = 0.0

    def answered(self, now: float) -> bool:
        """Something has been acknowledged over the rail. True if the state has changed."""
        changed = self.state is not State.HEALTHY
        if changed:
            self._since = now
        self.state = State.HEALTHY
        return changed

    def late(self, now: float) -> bool:
        """An acknowledgement is overdue. True if the state has changed."""
        changed = self.state is State.HEALTHY
        if changed:
            self._end_of_health(now)
            self.state = State.SUSPECT
        return changed

    def _end_of_health(self, now: float) -> None:
        if now - self._since >= CLEAN_S:
            self._pauses.reset()

    def failed(self, now: float) -> float:
        """The connection is gone. How long to leave it alone (s): twice as long each time, until it has worked well."""
        if self.state is State.HEALTHY:
            self._end_of_health(now)
        pause = self._pauses.next()
        self.state, self.until = State.PAUSED, now + pause
        return pause

    def steady(self, now: float) -> bool:
        """Healthy for a while: it has not only just begun to answer again, as all rails of a peer do that stood still."""
        return self.state is State.HEALTHY and now - self._since >= STEADY_S

    def probing(self) -> None:
        """The pause is over, a new connection is being made."""
        self.state = State.PROBING
