"""Draws `timelines.svg`: one iteration of 1F1B and of the plan, on the same pipeline with the same slow link.

    python docs/images/timelines.py [FILE.svg]

The picture is the simulator's. Stage times, link delay and microbatches are those of the demo (`configs/demo.json`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

from adaptra_plugin.report.gantt import draw_gantt
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.simulator import simulate

LINK = LinkProfile(2, 3, latency_ms=72)
HEALTHY = Profile(12, (StageProfile(forward_ms=24, backward_input_ms=24, backward_weight_ms=16),) * 4)
SLOW = replace(HEALTHY, links=(LINK,))
LIMITED = replace(SLOW, stages=tuple(replace(stage, max_activations=8) for stage in SLOW.stages))
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "adaptra", "font.family": "sans-serif"}


def draw(path: Path) -> None:
    """Writes the picture. The same libraries give the same bytes."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    stock = plan(HEALTHY, schedule="1f1b").schedule
    panels = [
        ("stock 1F1B, link 2-3 slow by 72 ms", simulate(stock, SLOW, "blocking")),
        ("Adaptra, link 2-3 slow by 72 ms", simulate(plan(LIMITED).schedule, LIMITED)),
    ]
    with matplotlib.rc_context(STYLE):
        draw_gantt(panels, path, [(LINK.src, LINK.dst)])


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
