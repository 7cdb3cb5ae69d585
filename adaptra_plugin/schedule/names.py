"""The schedules that exist, and other names that users write; apart from the code behind them, so that reading them
costs no imports.

A new schedule is a file in ``catalogue`` and a line here: planner, configuration, command line and coordinator derive
what they allow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A schedule."""

    what: str
    """In one line."""
    builder: str
    """``module:function``, the module relative to ``catalogue``. A schedule built by a rule is made by ``(ranks,
    microbatches)``, or ``(ranks, virtual_stages, microbatches)`` where it takes any number of stages a rank. An adaptive
    one is made by ``(tables, seed, known schedules)``."""
    adapts: bool = False
    """Whether it is planned for a profile, and so again when that changes."""
    stages_per_rank: int | None = 1
    """How many it takes; None: any number above one (adaptive: any number)."""
    for_jobs: bool = False
    """Whether a job can be configured to run it."""

    def load(self) -> Callable[..., Any]:
        """The function that builds it."""
        module, name = self.builder.split(":")
        build: Callable[..., Any] = getattr(import_module(module, "adaptra_plugin.schedule.catalogue"), name)
        return build


_ADAPTIVE = ".slack_adaptive:slack_adaptive"
SCHEDULES = {
    "gpipe": Entry("all forwards, then all backwards", ".gpipe:gpipe"),
    "1f1b": Entry("one forward, one backward in turns", ".one_f_one_b:one_f_one_b", for_jobs=True),
    "interleaved-1f1b": Entry("1F1B over several chunks a rank", ".interleaved_1f1b:interleaved_1f1b", False, None),
    "zb-h1": Entry("zero bubble with 1F1B's memory", ".zb_h1:zb_h1", for_jobs=True),
    "zb-h2": Entry("zero bubble with twice 1F1B's memory", ".zb_h2:zb_h2"),
    "zb-v": Entry("zero bubble, two chunks a rank in a V", ".zb_v:zb_v", False, 2),
    "slack-adaptive": Entry("warm-ups follow the delays of the links", _ADAPTIVE, True, None, for_jobs=True),
    "slack-adaptive-interleaved": Entry("the same over several chunks a rank", _ADAPTIVE, True, None),
}
"""What ``plan`` takes as the name of a schedule."""

LINK_MODELS = ("delegated", "blocking")
DUPLEX_MODES = ("full", "half")


def adaptive() -> list[str]:
    """Names of the schedules that are planned for a profile."""
    return [name for name, entry in SCHEDULES.items() if entry.adapts]


def stock_order(virtual_stages: int) -> str:
    """Name of the schedule that hosts run by themselves."""
    return "1f1b" if virtual_stages == 1 else "interleaved-1f1b"
