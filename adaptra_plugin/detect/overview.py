"""One iteration of the whole pipeline at a glance, for dashboards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptra_plugin.detect.samples import IterationReport


def overview(reports: Sequence[IterationReport]) -> dict[str, Any]:
    """Metrics of one iteration from the reports of all its ranks. Of several replicas the slowest counts: they wait
    for each other at the end of the iteration.

    Args:
        reports: of one iteration; at least one, in any order.

    Returns:
        Times in ms: `iteration_ms`, lists with one entry per stage in order (`bubble_ms`, `wait_ms`, `forward_ms`,
        `backward_input_ms`, `backward_weight_ms`), and `link_delay_ms` by link (`2-3`, its worst direction); with
        `iteration`, `plan_version` and `microbatches`.

    Raises:
        ValueError: without reports.
    """
    if not reports:
        raise ValueError("an overview needs the report of at least one rank")
    ranks: dict[int, list[IterationReport]] = {}
    links: dict[tuple[int, int], float] = {}
    for report in reports:
        ranks.setdefault(report.pp_rank, []).append(report)
        for link in report.links:
            if link.messages:
                ends = (min(link.src, link.dst), max(link.src, link.dst))
                links[ends] = max(links.get(ends, link.delay_ms), link.delay_ms)
    order = [ranks[pp_rank] for pp_rank in sorted(ranks)]
    return {
        "iteration": reports[0].iteration,
        "plan_version": max(report.plan_version for report in reports),
        "microbatches": reports[0].microbatches,
        "iteration_ms": max(report.iteration_ms for report in reports),
        "bubble_ms": [max(report.bubble_ms for report in same) for same in order],
        "wait_ms": [max(report.wait_ms for report in same) for same in order],
        "forward_ms": [max(report.times.forward_ms for report in same) for same in order],
        "backward_input_ms": [max(report.times.backward_input_ms for report in same) for same in order],
        "backward_weight_ms": [max(report.times.backward_weight_ms for report in same) for same in order],
        "link_delay_ms": {f"{low}-{high}": links[low, high] for low, high in sorted(links)},
    }
