"""How much of Adaptra a job can have, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from adaptra_plugin.errors import refuse


class Level(str, Enum):
    """Of support, the best first."""

    FULL = "full"
    """Plans with a split backward, which follow slow links."""
    STOCK_ORDER = "stock-order"
    """The stock order with an unsplit backward; transfers through the proxy, detection and reports all the same."""
    STOCK = "stock"
    """Nothing: the job runs as without the plug-in."""
    REFUSED = "refused"
    """The job does not start."""


@dataclass(frozen=True)
class Reason:
    """Why a job has less than the full support.

    Attributes:
        level: what is left.
        why: what in the job is the cause.
        remedy: what to change for more.
    """

    level: Level
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.why}: {self.remedy}"


Rule = tuple[Callable[[Any], bool], Reason]
"""Whether it applies to the host's configuration, and what follows."""


def in_stock_order(why: str, remedy: str) -> Reason:
    return Reason(Level.STOCK_ORDER, why, remedy)


def refused(why: str, remedy: str) -> Reason:
    return Reason(Level.REFUSED, why, remedy)


def judge(rules: Iterable[Rule], config: Any) -> list[Reason]:
    """The reasons that apply to a configuration, in the order of the rules."""
    return [reason for applies, reason in rules if applies(config)]


def level_of(reasons: Iterable[Reason]) -> Level:
    """The lowest level of some reasons; without any the full one."""
    return max((reason.level for reason in reasons), key=list(Level).index, default=Level.FULL)


def refuse_what_must_be(reasons: Sequence[Reason], otherwise: str) -> None:
    """Raises UnsupportedError for reasons to refuse, a line each. `otherwise`: how to run without Adaptra."""
    refuse([(it.why, it.remedy) for it in reasons if it.level is Level.REFUSED], otherwise)
