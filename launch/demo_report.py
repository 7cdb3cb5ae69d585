"""What the demo's four runs add up to: figures, table, picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from adaptra_plugin.report.gantt import draw_gantt
from adaptra_plugin.report.reading import by_rank
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.schedule.timeline import Span, Timeline, Transfer


@dataclass
class Summary:
    """`data` is what `summary.json` holds; `records` the JSONL records of the slow Adaptra run, per rank."""

    data: dict[str, Any]
    records: list[list[dict[str, Any]]]


def summarise(out: Path, base: dict[str, Any], titles: dict[str, str]) -> Summary:
    """Reads the results of all runs. Medians are over all iterations from the onset on, the same in every run, so that the
    iterations before the new plan count too. `cpu_share`: CPU time of all threads of the busiest rank in an iteration, over the
    time that its compute is paced to."""
    link = base["adaptra"]["simulate"]["links"][0]
    onset = int(link["from_iteration"])
    runs: dict[str, dict[str, Any]] = {}
    results = {name: _results(out / name) for name in titles}
    budget_ms = sum(base["adaptra"]["simulate"]["compute"].values()) * base["gradient_accumulation_steps"]
    for name, ranks in results.items():
        times = ranks[0]["iteration_ms"]
        runs[name] = {
            "title": titles[name],
            "median_iteration_ms": round(statistics.median(times[onset:]), 1),
            "iteration_ms": [round(ms, 1) for ms in times],
            "cpu_share": round(max(statistics.median(rank["cpu_ms"]) for rank in ranks) / budget_ms, 3),
            "engine": ranks[0]["engine"],
            "final_loss": ranks[0]["losses"][-1],
        }
    for name, run in runs.items():
        healthy = runs[name.split("-")[0] + "-healthy"]["median_iteration_ms"]
        run["slowdown_vs_own_healthy"] = round(run["median_iteration_ms"] / healthy, 3)
    first = results["stock-healthy"]
    records = by_rank(out / "adaptra-slow" / "events")
    events = [r for r in records[0] if r["type"] == "event"]
    links = [event for event in events if event["kind"] == "link"]
    quiet = [r for r in by_rank(out / "adaptra-healthy" / "events")[0] if r["type"] == "event"]
    median = {name: run["median_iteration_ms"] for name, run in runs.items()}
    data = {
        "paced_compute": True,
        "slow_link": f"{link['src']}-{link['dst']}",
        "slow_link_delay_ms": link["latency_ms"],
        "slow_from_iteration": onset,
        "microbatches": base["gradient_accumulation_steps"],
        "parameter_count": sum(rank["parameter_count"] for rank in first),
        "runs": runs,
        "adaptra_slow_over_adaptra_healthy": round(median["adaptra-slow"] / median["adaptra-healthy"], 3),
        "speedup_over_stock_with_slow_link": round(median["stock-slow"] / median["adaptra-slow"], 3),
        "adaptra_healthy_over_stock_healthy": round(median["adaptra-healthy"] / median["stock-healthy"], 3),
        "losses_identical": all(
            [rank["losses"] for rank in ranks] == [rank["losses"] for rank in first] for ranks in results.values()
        ),
        "parameters_identical": all(
            [rank["parameters_sha256"] for rank in ranks] == [rank["parameters_sha256"] for rank in first]
            for ranks in results.values()
        ),
        "events": events,
        "events_in_the_healthy_run": quiet,
        "detected_after_iterations": links[0]["found_iteration"] - onset + 1 if links else None,
        "files": {
            "events (JSONL)": str(out / "adaptra-slow" / "events"),
            "W&B (offline)": _wandb_run(out / "adaptra-slow"),
            "schedule (PNG)": str(out / "schedule.png"),
        },
    }
    return Summary(data, records)


def table(data: dict[str, Any]) -> Table:
    """Median iteration time, slowdown, speedup, and how much of the paced time is real work."""
    rows = Table(title=f"iterations from {data['slow_from_iteration']} on, paced compute")
    for heading in ("run", "median iteration", "to its healthy run", "to stock, slow link", "CPU of its budget"):
        rows.add_column(heading, justify="left" if heading == "run" else "right")
    slow = data["runs"]["stock-slow"]["median_iteration_ms"]
    for run in data["runs"].values():
        ms = run["median_iteration_ms"]
        figures = f"{run['slowdown_vs_own_healthy']:.2f}x", f"{slow / ms:.2f}x as fast", f"{run['cpu_share']:.0%}"
        rows.add_row(run["title"], f"{ms:.0f} ms", *figures)
    return rows


def picture(out: Path, summary: Summary) -> None:
    """Measured timelines of the slow Adaptra run: the first slow iteration, still under the old plan, and a late one under
    the new plan."""
    link = tuple(int(stage) for stage in summary.data["slow_link"].split("-"))
    onset = summary.data["slow_from_iteration"]
    last = max(r["iteration"] for r in summary.records[0] if r["type"] == "iteration")
    panels = []
    for iteration, what in (
        (onset, "before: slow link, plan for the healthy one"),
        (last, "after: slow link, new plan"),
    ):
        timeline = measured(summary.records, iteration)
        panels.append((f"{what} (iteration {iteration}, {timeline.makespan_ms:.0f} ms, measured)", timeline))
    draw_gantt(panels, out / "schedule.png", slow_links=[(link[0], link[1])])


def measured(records: list[list[dict[str, Any]]], iteration: int) -> Timeline:
    """The timeline of one iteration from every rank's record; all ranks share a host and so a clock."""
    found = [next(r for r in rank if r["type"] == "iteration" and r["iteration"] == iteration) for rank in records]
    spans: list[Span] = []
    delays: dict[str, float] = {}
    for record in found:
        delays.update(record["link_delay_ms"])
        origin = record["started_unix_ms"] - found[0]["started_unix_ms"]
        end = float("-inf")
        for text, start, stop in record["spans"]:
            # clocks are read per rank: rounding must not make neighbours overlap
            start = max(start + origin, end)
            end = max(stop + origin, start)
            spans.append(Span(record["pp_rank"], Action.parse(text), start, end))
    return Timeline.from_spans(spans, list(_transfers(spans, delays, len(found))))


def _transfers(spans: list[Span], delays: dict[str, float], stages: int) -> list[Transfer]:
    """What moved: from the end of the action that produced it, for the measured delay of its link."""
    moved = []
    for span in spans:
        step = {Kind.FORWARD: 1, Kind.BACKWARD_WEIGHT: 0}.get(span.action.kind, -1)
        target = span.rank + step
        if step and 0 <= target < stages:
            arrival = span.end_ms + delays.get(f"{span.rank}-{target}", 0.0)
            moved.append(Transfer(span.rank, target, span.action, span.end_ms, span.end_ms, arrival))
    return moved


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "result").glob("rank*.json"))]


def _wandb_run(folder: Path) -> str:
    runs = sorted(folder.glob("wandb/offline-run-*"))
    return str(runs[-1]) if runs else "none: wandb is not installed"
