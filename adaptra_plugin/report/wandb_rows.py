"""What W&B is given: flat names of series, and rows of the table of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptra_plugin.report.event import StragglerEvent

AXIS = "adaptra/iteration"
EVENTS = "adaptra/events"
MAX_SERIES = 64
"""A list of numbers longer than this is written as its mean and maximum."""
COLUMNS = (
    *("time", "subject", "state", "replica", "ranks", "hosts", "since_iteration", "found_iteration"),
    *("delay_before_ms", "delay_after_ms", "action", "predicted_before_ms", "predicted_after_ms", "predicted_gain"),
    *("plan_version", "text"),
)
"""Of the table of events."""


def flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """W&B's flat names: `adaptra/iteration_ms`, `adaptra/bubble_ms/3`, `adaptra/link_delay_ms/2-3`."""
    return dict(_series("adaptra", metrics))


def _series(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _series(f"{name}/{key}", item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if not all(isinstance(item, int | float) for item in value):
            return  # spans and the like: for the JSONL file, no series
        if len(value) > MAX_SERIES:
            yield f"{name}/mean", sum(value) / len(value)
            yield f"{name}/max", max(value)
        else:
            yield from ((f"{name}/{index}", item) for index, item in enumerate(value))
    elif value is not None:
        yield name, value


def cells(event: StragglerEvent) -> list[Any]:
    """The event's row of the table."""
    return [
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time_unix)),
        event.subject,
        event.state,
        event.replica,
        " ".join(map(str, event.ranks)),
        " ".join(event.hosts),
        event.since_iteration,
        event.found_iteration,
        event.delay_before_ms,
        event.delay_after_ms,
        event.action,
        event.predicted_iteration_ms_before,
        event.predicted_iteration_ms_after,
        event.predicted_gain,
        event.plan_version,
        event.sentence(),
    ]


def alert(event: StragglerEvent) -> tuple[str, str, str]:
    """Title (W&B takes up to 64 characters), text and level of the event's alert."""
    level = "INFO" if event.state == "healed" else "ERROR" if event.state == "lost" else "WARN"
    return f"Adaptra: {event.subject} {event.state}"[:63], event.sentence(), level
