"""Plans that change in the middle of a real training, caused and not left to timing.

What ranks report is taken from the configuration (stages take `TIMES`, links what is injected) in place of what a busy machine
makes of it, so what is found and planned follows from the iteration alone. And all ranks wait, where a test says so, until
the plan that must come has been agreed on, so that it begins two iterations later whatever the machine is doing. The link is
really slow, and measuring, reports, detection, planning and agreement are those of every job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from adaptra_plugin import _activation
from adaptra_plugin.config import parse_config
from adaptra_plugin.detect import IterationReport, StageTimes
from adaptra_plugin.runtime.iteration import Iteration

TIMES = StageTimes(5.0, 5.0, 3.0)
HEALTHY_MS = 0.5
CAUSED = {"refine_s": 0.0, "detector": {"warmup_iterations": 1, "min_history": 2, "confirm": 1, "heal": 1}}
"""Plans change for what is found, and for nothing else."""
FIRST = 2
"""Iteration whose reports complete the first profile, and lead to the first plan: one of warm-up, two of history."""


def plans_follow(block: dict[str, Any], after: Sequence[int]) -> Callable[[Any, int], None]:
    """In a forked rank, before it trains with `block`: what to call (`during`) after each iteration. After each of the
    iterations in `after`, the ranks wait for a plan that is newer than the one before."""
    links = parse_config(block).simulate.links
    measured = Iteration.report

    def slow(src: int, dst: int, iteration: int) -> float:
        return sum(
            link.latency_ms
            for link in links
            if {link.src, link.dst} == {src, dst}
            and link.from_iteration <= iteration
            and (link.to_iteration is None or iteration < link.to_iteration)
        )

    def report(self: Iteration, host: str) -> IterationReport:
        found = measured(self, host)
        return replace(
            found,
            chunks=(TIMES,) * len(found.chunks),
            links=tuple(
                replace(link, delay_ms=HEALTHY_MS + slow(link.src, link.dst, found.iteration)) for link in found.links
            ),
        )

    Iteration.report = report  # type: ignore[method-assign]
    known = 0

    def during(_: Any, step: int) -> None:
        nonlocal known
        if step in after and _activation._sessions:
            (session,) = _activation._sessions
            known = _newer(session._book, known, step)

    return during


def _newer(book: Any, known: int, step: int, deadline_s: float = 60.0) -> int:
    until = time.monotonic() + deadline_s
    while True:
        newest = max(book.version, *book._committed, 0)
        if newest > known:
            return int(newest)
        assert time.monotonic() < until, f"no plan newer than v{known} was agreed on after iteration {step}"
        time.sleep(0.01)
