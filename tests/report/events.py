"""A StragglerEvent to vary."""

from __future__ import annotations

from dataclasses import replace

from adaptra_plugin.report import StragglerEvent

SLOW = StragglerEvent(
    time_unix=1_700_000_000.0,
    kind="link",
    state="slow",
    replica=0,
    link="2-3",
    pp_ranks=(2, 3),
    ranks=(2, 3),
    hosts=("n1", "n2"),
    since_iteration=20,
    found_iteration=21,
    delay_before_ms=0.4,
    delay_after_ms=30.5,
    action="new plan v2 (warm-ups 7 6 5 1)",
    predicted_iteration_ms_before=812.0,
    predicted_iteration_ms_after=366.0,
    predicted_gain=812 / 366,
    plan_version=2,
)
HEALED = replace(
    SLOW,
    state="healed",
    since_iteration=60,
    found_iteration=62,
    delay_before_ms=30.5,
    delay_after_ms=0.42,
    action="back to plan v1",
    predicted_iteration_ms_before=None,
    predicted_iteration_ms_after=None,
    predicted_gain=None,
    plan_version=1,
)
