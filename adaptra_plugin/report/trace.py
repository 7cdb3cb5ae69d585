"""Traces of timelines for Perfetto and chrome://tracing (Trace Event Format, JSON object with ``traceEvents``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adaptra_plugin.schedule.actions import Kind
from adaptra_plugin.schedule.timeline import Timeline, Transfer

COLOURS = {
    Kind.FORWARD: "thread_state_running",
    Kind.BACKWARD_INPUT: "rail_animation",
    Kind.BACKWARD_WEIGHT: "good",
    Kind.FULL_BACKWARD: "rail_response",
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD_INPUT: "backward input",
    Kind.BACKWARD_WEIGHT: "backward weight",
    Kind.FULL_BACKWARD: "backward",
}


def trace_events(timelines: Sequence[tuple[str, Timeline]]) -> list[dict[str, Any]]:
    """Events of titled timelines: one process a timeline, one thread a rank, one more for each direction of a link.

    Complete events (``X``) for actions, idle times and transfers, microseconds; arrows (``s``, ``f``) from what was
    sent to what consumed it. Actions of the critical path say ``critical: true``. Transfers of one link that
    overlap in time lie on lanes of their own, because viewers nest events of one thread.
    """
    events: list[dict[str, Any]] = []
    for process, (title, timeline) in enumerate(timelines):
        events.append(_name("process_name", process, 0, title))
        events += [_name("thread_name", process, rank, f"rank {rank}") for rank in range(timeline.ranks)]
        events += _computing(process, timeline)
        events += _moving(process, timeline)
    return events


def write_trace(timelines: Sequence[tuple[str, Timeline]], path: str | Path) -> None:
    """Writes the trace as JSON, to be opened in ui.perfetto.dev or chrome://tracing."""
    Path(path).write_text(json.dumps({"traceEvents": trace_events(timelines), "displayTimeUnit": "ms"}))


def _computing(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    critical = set(timeline.critical_path)
    for span in timeline.spans:
        action = span.action
        yield {
            **_complete(str(action), NAMES[action.kind], process, span.rank, span.start_ms, span.end_ms),
            "cname": COLOURS[action.kind],
            "args": {"stage": action.stage, "microbatch": action.microbatch, "critical": action in critical},
        }
    for idle in timeline.idle:
        yield {
            **_complete(f"idle: {idle.cause}", "idle", process, idle.rank, idle.start_ms, idle.end_ms),
            "cname": "grey",
        }


def _moving(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    begins = {
        (s.action.stage, s.action.kind is Kind.FORWARD, s.action.microbatch): s
        for s in timeline.spans
        if s.action.kind is not Kind.BACKWARD_WEIGHT
    }
    lanes: dict[tuple[int, int], list[float]] = {}
    threads: dict[tuple[int, int, int], int] = {}
    for number, moved in enumerate(sorted(timeline.transfers, key=lambda t: (t.ready_ms, t.src, t.dst))):
        if moved.end_ms <= moved.ready_ms:
            continue  # took no time: nothing to see
        lane = _lane(lanes.setdefault((moved.src, moved.dst), []), moved)
        where = (moved.src, moved.dst, lane)
        if where not in threads:
            threads[where] = timeline.ranks + len(threads)
            suffix = f" ({lane + 1})" if lane else ""
            yield _name("thread_name", process, threads[where], f"link {moved.src} → {moved.dst}{suffix}")
        yield {
            **_complete(f"{moved.action}", "transfer", process, threads[where], moved.ready_ms, moved.end_ms),
            "args": {"waited_ms": moved.start_ms - moved.ready_ms},
        }
        forward = moved.action.kind is Kind.FORWARD
        consumer = begins.get((moved.action.stage + (1 if forward else -1), forward, moved.action.microbatch))
        if consumer is not None:
            arrow = {"name": "input", "cat": "transfer", "id": process << 32 | number, "pid": process}
            yield {**arrow, "ph": "s", "tid": moved.src, "ts": moved.ready_ms * 1e3}
            yield {**arrow, "ph": "f", "bp": "e", "tid": consumer.rank, "ts": consumer.start_ms * 1e3}


def _lane(ends: list[float], moved: Transfer) -> int:
    for lane, end in enumerate(ends):
        if end <= moved.ready_ms:
            ends[lane] = moved.end_ms
            return lane
    ends.append(moved.end_ms)
    return len(ends) - 1


def _complete(name: str, category: str, process: int, thread: int, start: float, end: float) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": start * 1e3,
        "dur": (end - start) * 1e3,
    }


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
