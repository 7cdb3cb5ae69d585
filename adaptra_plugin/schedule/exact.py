"""The exact model: with microbatches in order on every stage, the best schedule is a job shop that CP-SAT proves.

Per action one start; one NoOverlap a rank; chains along the pipeline. With one stage a rank an activation limit K is
just "F of microbatch m + K after W of m", because activations are freed in the order in which they are made; that is
what makes limits cheap to prove. Formulation: Baker, "Introduction to Sequencing and Scheduling" (1974),
disjunctive; solver: Perron and Furnon, OR-tools. CrossPipe (Chen et al., ATC 2025) solves for latency and bandwidth
ahead of time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptra_plugin.errors import PlanError, UnsupportedError
from adaptra_plugin.schedule.bound import bound_ns
from adaptra_plugin.schedule.graph import chains, heads
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.tables import Ints, Tables

SETTLE_WORK = 2.0
"""Deterministic work, about as many seconds, that goes into finding the one schedule among equally short ones."""
LEAST_S = 0.05
"""The solver gets this long even if building the model has used the time up."""


@dataclass(frozen=True)
class Solution:
    """Rows of the best schedule so far (None: none beyond the hint), proven bound in nanoseconds, and whether done."""

    rows: Ints | None
    bound: int
    optimal: bool


class Model:
    """The CP-SAT model of a profile's tables. Raises UnsupportedError without OR-tools."""

    def __init__(self, tables: Tables, longest: int) -> None:
        """``longest``: a makespan in nanoseconds that is known to be reachable."""
        try:
            from ortools.sat.python import cp_model
        except ImportError as error:
            raise UnsupportedError(
                f"exact planning needs OR-tools, which cannot be imported ({error}): pip install 'adaptra-plugin[exact]'"
            ) from error
        self.tables = tables
        self.cp = cp_model
        self.model = cp_model.CpModel()
        times = [tables.duration.ravel(), tables.latency.ravel(), tables.transfer.ravel()]
        self.unit = int(np.gcd.reduce(np.concatenate(times))) or 1  # smaller numbers, same problem
        self.horizon = longest // self.unit
        self.duration = tables.duration // self.unit
        self.start = self._actions()
        self._chains()
        self._limits()
        bound = bound_ns(tables)[0]
        self.makespan = self.model.new_int_var(min(math.ceil(bound / self.unit), self.horizon), self.horizon, "")
        for s in range(len(tables.stage_rank)):
            self.model.add(self.makespan >= self.start[s, 2, -1] + int(self.duration[s, 2]))
        self.model.minimize(self.makespan)

    def _actions(self) -> Any:
        stages, n = len(self.tables.stage_rank), self.tables.microbatches
        start = np.empty((stages, 3, n), object)
        intervals: list[list[Any]] = [[] for _ in self.tables.cap]
        for s in range(stages):
            for kind in range(3):
                cost = int(self.duration[s, kind])
                for m in range(n):
                    start[s, kind, m] = self.model.new_int_var(0, max(0, self.horizon - cost), "")
                    interval = self.model.new_fixed_size_interval_var(start[s, kind, m], cost, "")
                    intervals[self.tables.stage_rank[s]].append(interval)
                    if m:
                        self.model.add(start[s, kind, m] >= start[s, kind, m - 1] + cost)
        for mine in intervals:
            self.model.add_no_overlap(mine)
        return start

    def _chains(self) -> None:
        stages = len(self.tables.stage_rank)
        for s in range(stages):
            self._after(s, 1, s, 2, 0)
            if s + 1 < stages:
                self._moved(0, s, s + 1)
                self._moved(1, s + 1, s)
            else:
                self._after(s, 0, s, 1, 0)

    def _after(self, s: int, kind: int, t: int, other: int, lag: int) -> None:
        for m in range(self.tables.microbatches):
            self.model.add(self.start[t, other, m] >= self.start[s, kind, m] + int(self.duration[s, kind]) + lag)

    def _moved(self, way: int, s: int, t: int) -> None:
        """Transfers from stage s to stage t. The occupancy matters only where it is longer than what produces them,
        or where several stages share the link; that some order of transfers exists is all that is asked."""
        transfer = int(self.tables.transfer[way, t]) // self.unit
        lag = int(self.tables.latency[way, t]) // self.unit + transfer
        self._after(s, way, t, way, lag)
        if transfer <= int(self.duration[s, way]):
            return
        sent = [self.model.new_int_var(0, self.horizon, "") for _ in range(self.tables.microbatches)]
        for m, slot in enumerate(sent):
            self.model.add(slot >= self.start[s, way, m] + int(self.duration[s, way]))
            self.model.add(self.start[t, way, m] >= slot + lag)
            if m:
                self.model.add(slot >= sent[m - 1] + transfer)

    def _limits(self) -> None:
        n, ranks = self.tables.microbatches, len(self.tables.cap)
        for r in range(ranks):
            mine = np.flatnonzero(self.tables.stage_rank == r).tolist()
            cap = int(self.tables.cap[r])
            if cap >= n * len(mine):
                continue
            if len(mine) == 1:
                s = mine[0]
                for m in range(n - cap):
                    self.model.add(self.start[s, 0, m + cap] >= self.start[s, 2, m] + int(self.duration[s, 2]))
                continue
            held = []
            for s in mine:
                for m in range(n):
                    end = self.start[s, 2, m] + int(self.duration[s, 2])
                    size = self.model.new_int_var(0, self.horizon, "")
                    held.append(self.model.new_interval_var(self.start[s, 0, m], size, end, ""))
            self.model.add_cumulative(held, [1] * len(held), cap)

    def hint(self, rows: Ints) -> None:
        """Starts the search from a schedule."""
        flat = self.start.ravel()
        for n, when in enumerate(starts(self.tables, rows).tolist()):
            self.model.add_hint(flat[n], when // self.unit)

    def solve(
        self, seconds: float, seed: int, workers: int, improved: Callable[[Solution], None] | None = None
    ) -> Solution:
        """Searches for at most ``seconds``; ``improved`` hears of every better schedule.

        Several workers race, which is several times faster than taking turns, and find equally short schedules in
        any order; ``solve_exactly`` makes up for that. Raises PlanError where the limits leave no schedule.
        """
        solver = self.cp.CpSolver()
        solver.parameters.max_time_in_seconds = seconds
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = seed
        listener = None
        if improved is not None:
            listener = self._listener(improved)
        status = solver.solve(self.model, listener)
        if status == self.cp.INFEASIBLE:
            raise PlanError("no in-order schedule keeps the activation limits within the known makespan")
        bound = math.ceil(solver.best_objective_bound - 1e-6) * self.unit
        found = status in (self.cp.OPTIMAL, self.cp.FEASIBLE)
        return Solution(self._rows(solver.value) if found else None, bound, status == self.cp.OPTIMAL)

    def tie_break(self, makespan: int, seconds: float, seed: int) -> Ints | None:
        """A schedule of exactly the proven ``makespan`` (nanoseconds), found by one worker within an amount of work,
        hence the same every time; None where that was not enough."""
        fixed = self.model.clone()
        fixed.add(fixed.get_int_var_from_proto_index(self.makespan.index) == makespan // self.unit)
        fixed.clear_objective()
        solver = self.cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        solver.parameters.max_deterministic_time = SETTLE_WORK
        solver.parameters.max_time_in_seconds = seconds
        status = solver.solve(fixed)
        if status not in (self.cp.OPTIMAL, self.cp.FEASIBLE):
            return None
        return self._rows(lambda v: solver.value(fixed.get_int_var_from_proto_index(v.index)))

    def _listener(self, improved: Callable[[Solution], None]) -> Any:
        outer = self

        class Listener(self.cp.CpSolverSolutionCallback):  # type: ignore[name-defined,misc]
            def on_solution_callback(self) -> None:
                bound = math.ceil(self.best_objective_bound - 1e-6) * outer.unit
                improved(Solution(outer._rows(self.value), bound, False))

        return Listener()

    def _rows(self, value: Callable[[Any], int]) -> Ints:
        """Actions of each rank in order of their starts. Actions that take no time may share an instant: they come in an
        order that respects what they wait for, and W first, which gives memory back."""
        n = self.tables.microbatches
        ranks = self.tables.stage_rank.tolist()
        times = [value(v) for v in self.start.ravel()]
        cost = np.repeat(self.duration[:, :3].ravel(), n).tolist()
        followers, waits = _successors(self.tables)
        # an action that still waits only does so for others of the same instant, which leave the heap before later ones
        heap = [(times[k], times[k] + cost[k], -(k // n % 3), k % n, k) for k, count in enumerate(waits) if count == 0]
        heapq.heapify(heap)
        rows: list[list[int]] = [[] for _ in self.tables.cap]
        while heap:
            *_, number = heapq.heappop(heap)
            rows[ranks[number // (3 * n)]].append(number)
            for k in followers[number]:
                waits[k] -= 1
                if waits[k] == 0:
                    heapq.heappush(heap, (times[k], times[k] + cost[k], -(k // n % 3), k % n, k))
        return np.array(rows, np.int64)


def _successors(tables: Tables) -> tuple[list[list[int]], list[int]]:
    """Which action numbers wait for each, and for how many each waits: its input, the microbatch before, and, with one
    stage a rank, the W that makes room for an F."""
    n, stages = tables.microbatches, len(tables.stage_rank)
    followers: list[list[int]] = [[] for _ in range(3 * n * stages)]
    waits = [0] * len(followers)
    number = np.arange(len(followers)).reshape(stages, 3, n)
    pairs = [
        (number[:, :, :-1], number[:, :, 1:]),  # in order
        (number[:, 0], number[:, 1]),
        (number[:, 1], number[:, 2]),
        (number[:-1, 0], number[1:, 0]),
        (number[1:, 1], number[:-1, 1]),
    ]
    if stages == len(tables.cap):
        for stage, rank in enumerate(tables.stage_rank.tolist()):
            cap = min(int(tables.cap[rank]), n)
            pairs.append((number[stage, 2, : n - cap], number[stage, 0, cap:]))
    for before, after in pairs:
        for a, b in zip(before.ravel().tolist(), after.ravel().tolist(), strict=True):
            followers[a].append(b)
            waits[b] += 1
    return followers, waits


def starts(tables: Tables, rows: Ints) -> Ints:
    """Earliest start of every action number of a schedule, nanoseconds. Raises PlanError for a deadlock."""
    before, after, lag = chains(tables)
    n = tables.microbatches
    cost = np.repeat(tables.duration[:, :3].ravel(), n)
    head, order = np.empty_like(cost), np.empty_like(cost)
    if heads(rows, np.repeat(tables.stage_rank, 3 * n), cost, before, after, lag, head, order) < 0:
        raise PlanError("the schedule deadlocks")
    return head


def solve_exactly(
    tables: Tables,
    known: Schedule,
    makespan: int,
    seconds: float,
    *,
    seed: int = 0,
    workers: int = 2,
    improved: Callable[[Solution], None] | None = None,
) -> Solution:
    """Improves a known schedule, whose makespan in nanoseconds is given, for at most ``seconds``.

    Deterministic where the optimum is proven in time and found again by ``Model.tie_break``; the makespan always is.
    """
    until = time.monotonic() + seconds
    model = Model(tables, makespan)
    if known.split_only:
        model.hint(known.rows)
    solution = model.solve(max(until - time.monotonic(), LEAST_S), seed, workers, improved)
    left = until - time.monotonic()
    if workers > 1 and solution.optimal and solution.bound < makespan and left > 0:
        rows = model.tie_break(solution.bound, left, seed)
        return solution if rows is None else replace(solution, rows=rows)
    return solution
