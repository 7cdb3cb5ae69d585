"""The worker process of ``refine``: one JSON job on standard input, JSON lines out, at the lowest priority."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from adaptra_plugin.errors import AdaptraError
from adaptra_plugin.schedule.exact import LEAST_S, Solution, solve_exactly
from adaptra_plugin.schedule.planner import makespan_ns
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.search import Problem, give_back
from adaptra_plugin.schedule.tables import NS, Tables, tabulate


def tell(message: dict[str, Any]) -> None:
    """One line to the process that waits."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def report(tables: Tables, solution: Solution, done: bool) -> None:
    """A solution as a message; the last one with as little memory as keeps its makespan."""
    rows = solution.rows
    if rows is not None and done:
        problem = Problem.of(tables)
        found = problem.scored(rows)
        rows = give_back(problem, found, found.makespan, tolerance=0).rows
    ranks = None if rows is None else Schedule.from_rows(rows, tables.microbatches).to_text()
    tell({"ranks": ranks, "bound_ms": solution.bound / NS, "done": done})


def main() -> None:
    """Reads the job, solves, reports; the exit code is 0 unless the process is killed."""
    job = json.loads(sys.stdin.readline())
    for watch in (_end_with_input, _end_with_parent):
        threading.Thread(target=watch, args=(job["parent"],), daemon=True).start()
    try:
        known = Schedule.from_text(job["ranks"])
        tables = tabulate(Profile.from_json(job["profile"]), known.stage_rank)
        solution = solve_exactly(
            tables,
            known,
            makespan_ns(known, tables),
            max(job["until_unix"] - time.time(), LEAST_S),
            seed=job["seed"],
            workers=job["workers"],
            improved=lambda better: report(tables, better, done=False),
        )
        report(tables, solution, done=True)
    except AdaptraError as error:
        tell({"error": str(error), "done": True})


def _end_with_input(parent: int) -> None:
    """The process that waits has closed its end of the pipe, or is gone."""
    sys.stdin.read()
    os._exit(0)


def _end_with_parent(parent: int) -> None:
    """A child that the parent has forked since holds the pipe open even when the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
