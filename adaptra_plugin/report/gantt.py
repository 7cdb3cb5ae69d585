"""Gantt pictures of timelines, in the colours of the zero-bubble papers: F blue, I (backward input) teal, W green."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.schedule.actions import Kind
from adaptra_plugin.schedule.timeline import Timeline

COLOURS = {
    Kind.FORWARD: "#4C78C8",
    Kind.BACKWARD_INPUT: "#3FB5AE",
    Kind.BACKWARD_WEIGHT: "#7CB85C",
    Kind.FULL_BACKWARD: "#3FA08C",
}
LABELS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD_INPUT: "backward input",
    Kind.BACKWARD_WEIGHT: "backward weight",
    Kind.FULL_BACKWARD: "backward (fused)",
}
BUBBLES = {"dependency": "#E9E9E9", "link": "#F3B0A8", "blocking": "#E8833A"}
BUBBLE_LABELS = {"dependency": "idle: input not computed", "link": "idle: on the link", "blocking": "idle: link busy"}
SLOW = "#C8291E"
NARROWEST, WIDEST, INCHES_PER_ACTION, INCHES_PER_DIGIT = 16.0, 26.0, 0.16, 0.064


def draw_gantt(
    timelines: Sequence[tuple[str, Timeline]],
    path: str | Path,
    slow_links: Iterable[tuple[int, int]] = (),
) -> None:
    """Draws one panel per titled timeline, all on one time axis, into a PNG or SVG (by the suffix of ``path``).

    One row a rank, lighter shades for its later stages, microbatch numbers where they fit, bubbles by cause;
    ``slow_links`` are pairs of ranks whose link is marked, see ``link_marks``. The picture is as wide as its actions
    need, within limits. Raises UnsupportedError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("pictures need matplotlib: pip install 'adaptra-plugin[plots]'") from error
    if not timelines:
        raise ValueError("nothing to draw: no timelines given")
    longest = max(timeline.makespan_ms for _, timeline in timelines) or 1.0
    heights = [timeline.ranks * 0.34 + 0.5 for _, timeline in timelines]
    lengths = [s.end_ms - s.start_ms for _, timeline in timelines for s in timeline.spans]
    typical = statistics.median(lengths) if lengths else longest
    width = min(WIDEST, max(NARROWEST, longest / max(typical, 1e-9) * INCHES_PER_ACTION))
    figure = Figure(figsize=(width, sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    marked = sorted({(min(pair), max(pair)) for pair in slow_links})
    for axes, (title, timeline) in zip(panels, timelines, strict=True):
        _panel(axes, title, timeline, longest, marked, 0.92 * width / longest)
    panels[-1].set_xlabel("time, ms")
    figure.legend(
        handles=_legend([timeline for _, timeline in timelines], bool(marked)),
        loc="outside lower center",
        ncols=8,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(Path(path), dpi=130)


def _panel(
    axes: Any, title: str, timeline: Timeline, longest: float, marked: Sequence[tuple[int, int]], inches_per_ms: float
) -> None:
    for idle in timeline.idle:
        axes.broken_barh(
            [(idle.start_ms, idle.end_ms - idle.start_ms)],
            (idle.rank - 0.42, 0.84),
            facecolor=BUBBLES[idle.cause],
            hatch="///" if idle.cause == "link" else None,
            edgecolor="white" if idle.cause == "link" else "none",
            linewidth=0,
        )
    held: dict[int, set[int]] = {}
    bars: dict[tuple[int, int, Kind], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        held.setdefault(span.rank, set()).add(span.action.stage)
        bar = (span.start_ms, span.end_ms - span.start_ms)
        bars.setdefault((span.rank, span.action.stage, span.action.kind), []).append(bar)
    for (rank, stage, kind), spans in bars.items():
        axes.broken_barh(
            spans,
            (rank - 0.42, 0.84),
            facecolor=_shade(COLOURS[kind], sorted(held[rank]).index(stage), len(held[rank])),
            edgecolor="white",
            linewidth=0.5,
        )
    for span in timeline.spans:
        text = str(span.action.microbatch)
        if (span.end_ms - span.start_ms) * inches_per_ms > INCHES_PER_DIGIT * len(text):
            axes.text(
                (span.start_ms + span.end_ms) / 2,
                span.rank,
                text,
                ha="center",
                va="center",
                fontsize=6.5,
                color="white",
                clip_on=True,
            )
    for low, high in marked:
        for height, line in link_marks(low, high, timeline.ranks):
            if line:
                axes.axhline(height, color=SLOW, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3, clip_on=False)
            axes.annotate(
                f" slow {low}–{high}",
                (1, height),
                xycoords=("axes fraction", "data"),
                color=SLOW,
                fontsize=9,
                va="center",
                annotation_clip=False,
            )
    axes.axvline(timeline.makespan_ms, color="#222222", linewidth=1)
    busy = sum(s.end_ms - s.start_ms for s in timeline.spans)
    idle_share = 1 - busy / (timeline.ranks * timeline.makespan_ms) if timeline.makespan_ms else 0.0
    axes.set_title(f"{title}: {timeline.makespan_ms:.1f} ms, {idle_share:.0%} idle", loc="left", fontsize=11)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.002)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def link_marks(low: int, high: int, ranks: int) -> list[tuple[float, bool]]:
    """Where the link of two ranks is marked: heights in rows, and whether a line is drawn there beside the label.

    Between the rows of neighbours; at both outer edges for the link that wraps around, and at the rows of both ranks,
    without a line, for any other: a line in the middle would lie between two ranks that it does not connect.
    """
    if high >= ranks:
        return []
    if high - low == 1:
        return [((low + high) / 2, True)]
    if (low, high) == (0, ranks - 1):
        return [(-0.5, True), (ranks - 0.5, True)]
    return [(float(low), False), (float(high), False)]


def _shade(colour: str, chunk: int, chunks: int) -> tuple[float, ...]:
    """Later stages of a rank are lighter, as in the pictures of interleaved schedules."""
    white = 0.45 * chunk / max(1, chunks - 1)
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return tuple(part + (1 - part) * white for part in parts)


def _legend(timelines: Sequence[Timeline], marked: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {span.action.kind for timeline in timelines for span in timeline.spans}
    causes = {idle.cause for timeline in timelines for idle in timeline.idle}
    handles: list[Any] = [Patch(color=COLOURS[k], label=f"{k} {LABELS[k]}") for k in COLOURS if k in kinds]
    for cause, colour in BUBBLES.items():
        if cause in causes:
            hatch = "///" if cause == "link" else None
            handles.append(Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=BUBBLE_LABELS[cause]))
    if marked:
        handles.append(Line2D([], [], color=SLOW, linewidth=1.6, linestyle=(0, (5, 2)), label="slow link"))
    return handles
