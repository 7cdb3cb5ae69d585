"""The whole pipeline at a glance."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes, overview


def report(replica: int, stage: int, links: tuple[LinkDelay, ...], scale: float = 1.0) -> IterationReport:
    times = (StageTimes(1.0 * scale, 2.0 * scale, 3.0 * scale),)
    return IterationReport(replica, stage, 0, "n", 7, 8, 100.0 * scale, 2, times, links, 10.0 * scale, 60.0)


def test_stages_in_order_links_by_their_worst_direction_and_the_slowest_replica() -> None:
    reports = [
        report(0, 0, (LinkDelay(1, 0, 0.5, 8),)),
        report(0, 1, (LinkDelay(0, 1, 30.0, 8), LinkDelay(2, 1, 0.3, 8))),
        report(0, 2, (LinkDelay(1, 2, 99.0, 0),)),  # no message: no delay
        report(1, 1, (LinkDelay(2, 1, 0.7, 8),), scale=2.0),
    ]
    reports[3] = replace(reports[3], plan_version=3)
    random.Random(0).shuffle(reports)
    assert overview(reports) == {
        "iteration": 7,
        "plan_version": 3,
        "microbatches": 8,
        "iteration_ms": 200.0,
        "bubble_ms": [40.0, 140.0, 40.0],
        "wait_ms": [10.0, 20.0, 10.0],
        "forward_ms": [1.0, 2.0, 1.0],
        "backward_input_ms": [2.0, 4.0, 2.0],
        "backward_weight_ms": [3.0, 6.0, 3.0],
        "link_delay_ms": {"0-1": 30.0, "1-2": 0.7},
    }


def test_no_reports() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        overview([])
