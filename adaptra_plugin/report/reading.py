"""Reads what `JsonlWriter` has written: the files of all ranks of a directory, in which several runs may have reported."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptra_plugin.errors import ConfigError

logger = logging.getLogger("adaptra")
UNKNOWN = "-"
"""The run of records that name none."""


@dataclass
class RunSummary:
    """What the records of a run add up to."""

    run: str
    started: float
    """Seconds since the epoch, as `ended`."""
    ended: float
    ranks: set[int] = field(default_factory=set)
    iteration_ms: dict[int, list[float]] = field(default_factory=dict)
    """Of each rank."""
    iterations: int = 0
    """One more than the largest number of an iteration."""
    events: list[str] = field(default_factory=list)
    """Sentences, in the order of their times, as `plans`."""
    plans: list[str] = field(default_factory=list)
    dropped: int = 0
    """Records that the files miss."""

    @property
    def median_ms(self) -> float | None:
        """Median iteration of the lowest rank that wrote iterations."""
        return statistics.median(self.iteration_ms[min(self.iteration_ms)]) if self.iteration_ms else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.run,
            "started": self.started,
            "ended": self.ended,
            "ranks": sorted(self.ranks),
            "iterations": self.iterations,
            "median_iteration_ms": self.median_ms,
            "events": self.events,
            "plans": self.plans,
            "dropped": self.dropped,
        }


def read(directory: str | Path) -> Iterator[dict[str, Any]]:
    """All records of a directory, file by file, each from the oldest on; lines that were cut short are left out.

    Raises:
        ConfigError: there are no files.
    """
    files = sorted(
        (path for name in ("rank*.jsonl", "rank*.jsonl.1") for path in Path(directory).glob(name) if path.is_file()),
        key=lambda path: (path.name.split(".")[0], path.suffix != ".1"),
    )
    if not files:
        raise ConfigError(f"{directory}: no rank*.jsonl there: expected the job's report.directory")
    for path in files:
        try:
            with path.open("rb") as lines:
                yield from _records(lines)
        except OSError as error:  # renamed meanwhile by the job that writes it, or not for us
            logger.warning("%s cannot be read and is left out: %s", path, error.strerror)


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("time"), int | float):
            yield {"run": UNKNOWN, **record}


def runs(directory: str | Path) -> list[RunSummary]:
    """The runs that have reported there, the newest last.

    Raises:
        ConfigError: there are no files.
    """
    found: dict[str, RunSummary] = {}
    said: dict[str, list[tuple[float, str, str]]] = {}
    for record in read(directory):
        run, time = str(record["run"]), float(record["time"])
        summary = found.setdefault(run, RunSummary(run, time, time))
        summary.started, summary.ended = min(summary.started, time), max(summary.ended, time)
        rank, kind = record.get("rank"), record.get("type")
        if isinstance(rank, int):
            summary.ranks.add(rank)
        if kind == "iteration" and isinstance(record.get("iteration"), int):
            summary.iterations = max(summary.iterations, record["iteration"] + 1)
            if isinstance(record.get("iteration_ms"), int | float):
                summary.iteration_ms.setdefault(rank or 0, []).append(record["iteration_ms"])
        elif kind in ("event", "plan") and isinstance(record.get("text"), str):
            said.setdefault(run, []).append((time, kind, record["text"]))
        elif kind == "dropped" and isinstance(record.get("records"), int):
            summary.dropped += record["records"]
    for run, texts in said.items():
        for _, kind, text in sorted(texts):
            there = found[run].events if kind == "event" else found[run].plans
            if text not in there:  # the coordinator's plans are in every rank's file
                there.append(text)
    return sorted(found.values(), key=lambda summary: summary.started)


def choose(directory: str | Path, run: str | None = None) -> RunSummary:
    """The run asked for, by default the newest.

    Raises:
        ConfigError: there are no files, or no such run.
    """
    there = runs(directory)
    for summary in there:
        if summary.run == run:
            return summary
    if run is not None or not there:
        names = ", ".join(summary.run for summary in there)
        raise ConfigError(
            f"{directory}: no run {run} there: expected one of {names}" if names else f"{directory}: no records"
        )
    return there[-1]


def by_rank(directory: str | Path, run: str | None = None) -> list[list[dict[str, Any]]]:
    """The records of a run, by default the newest, rank by rank, in the order of their times.

    Raises:
        ConfigError: as `choose`.
    """
    chosen = choose(directory, run)
    ranks: dict[int, list[dict[str, Any]]] = {rank: [] for rank in sorted(chosen.ranks)}
    for record in read(directory):
        if record["run"] == chosen.run and record.get("rank") in ranks:
            ranks[record["rank"]].append(record)
    return [sorted(records, key=lambda record: record["time"]) for records in ranks.values()]
