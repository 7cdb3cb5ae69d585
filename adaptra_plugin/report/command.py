"""``adaptra report``: what the runs of a directory have reported."""

from __future__ import annotations

import json
import time

from adaptra_plugin.report.reading import RunSummary, choose, read, runs


def run(directory: str, name: str | None, *, listing: bool, records: bool, as_json: bool) -> int:
    """Prints one run (by default the newest), all runs as a list, or the records of one.

    Raises:
        ConfigError: the directory has no such reports.
    """
    if listing:
        found = runs(directory)
        print(json.dumps([one.to_json() for one in found]) if as_json else _table(found))
        return 0
    chosen = choose(directory, name)
    if records:
        for record in read(directory):
            if record["run"] == chosen.run:
                print(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
        return 0
    print(json.dumps(chosen.to_json()) if as_json else _text(chosen))
    return 0


def _table(found: list[RunSummary]) -> str:
    rows = [("run", "began", "ended", "ranks", "iterations", "median ms", "events")]
    rows += [
        (
            one.run,
            _moment(one.started),
            _moment(one.ended),
            str(len(one.ranks)),
            str(one.iterations),
            "-" if one.median_ms is None else f"{one.median_ms:.1f}",
            str(len(one.events)),
        )
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _text(one: RunSummary) -> str:
    lines = [
        f"run {one.run}: {_moment(one.started)} to {_moment(one.ended)}, ranks {', '.join(map(str, sorted(one.ranks)))}",
        f"{one.iterations} iterations" + ("" if one.median_ms is None else f", median {one.median_ms:.1f} ms"),
        *one.plans,
        *one.events,
    ]
    if one.dropped:
        lines.append(f"{one.dropped} records are missing (queue or disk full)")
    return "\n".join(lines)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
