"""Delays that say nothing of a link, because one of its ends stood still meanwhile. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SHARE = 0.1
"""A delay is disturbed if it lies in pauses for more than this part of it."""
_REMEMBERED = 1024


@dataclass(slots=True)
class _Pause:
    began: float
    ended: float
    until: float
    """When what had piled up was through."""


class Pauses:
    """When the two proxies of a link stood still: were stopped, throttled, or moved with their machine.

    The news of a pause of the other end may come after the messages that it has delayed; so messages are judged late, when
    their delays are used. `look`: takes in what has come meanwhile.
    """

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self._look = look
        self._found: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def add(self, began: float, ended: float) -> None:
        """One end stood still (s, clock of this rank). Any thread may call it."""
        self._found.append((began, ended))

    def undisturbed(self, samples: Sequence[tuple[float, float]]) -> list[float]:
        """Of messages' `(delay (ms), when it came (s, clock of this rank))`, the delays that are the link's, as they came.

        What piled up during a pause still holds up what is sent after it, for as long again at most.
        """
        self._look()
        order = sorted(samples, key=lambda sample: sample[1])
        pauses = [_Pause(began, ended, ended) for began, ended in list(self._found)]
        found = []
        for delay_ms, came in order:
            left = came - delay_ms / 1e3
            crossed = [pause for pause in pauses if pause.began < came and left < pause.until]
            inside = sum(min(came, pause.until) - max(left, pause.began) for pause in crossed)
            if inside <= SHARE * (came - left):
                found.append(delay_ms)
                continue
            for pause in crossed:
                pause.until = max(pause.until, min(came, 2 * pause.ended - pause.began))
        return found
