"""The fast heuristic behind the slack-adaptive schedules: candidates, local search, then memory given back.

Bounded by counted work, never by a clock, so that every machine finds the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adaptra_plugin.schedule.analysis import adapted_slack
from adaptra_plugin.schedule.bound import bound_ns
from adaptra_plugin.schedule.graph import chains, heads
from adaptra_plugin.schedule.list_scheduler import NEVER, list_schedule
from adaptra_plugin.schedule.memory_trim import peaks, trim_memory, trim_warmups
from adaptra_plugin.schedule.periodic_search import periodic_search
from adaptra_plugin.schedule.replay import replay
from adaptra_plugin.schedule.tables import Ints, Tables, per_microbatch
from adaptra_plugin.schedule.tabu import tabu_search

TOLERANCE = 1000
"""Makespans within one part in this many count as equal; then memory decides."""
STRESS_PERCENT = 110
"""Plans are also replayed with latencies this high: a measured latency is never exact ..."""
STRESS_TOLERANCE = 200
"""... and memory is given back only where that costs at most one part in this many."""
FINALISTS = 3
"""Of the schedules that are equal in both respects, how many are tried for the least memory."""
STARTS = 6
"""Candidates, distinct in makespan, that the local search starts from."""


@dataclass(frozen=True)
class Found:
    """A schedule as action numbers ``[rank, position]``, its makespan and its makespan under stress, nanoseconds."""

    makespan: int
    stressed: int
    rows: Ints


@dataclass(frozen=True)
class Problem:
    """Tables in the form that the search kernels take, one entry an action number."""

    tables: Tables
    rank_of: Ints
    cost: Ints
    before: Ints
    after: Ints
    lag: Ints
    stressed_lag: Ints
    bound: int

    @classmethod
    def of(cls, tables: Tables) -> Problem:
        """The problem that tables describe; ``bound`` is its lower bound in nanoseconds."""
        n = tables.microbatches
        before, after, lag = chains(tables)
        cost = np.repeat(tables.duration[:, :3].ravel(), n)
        rank_of = np.repeat(tables.stage_rank, 3 * n)
        return cls(tables, rank_of, cost, before, after, lag, lag * STRESS_PERCENT // 100, bound_ns(tables)[0])

    @property
    def graph(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """Arguments that every search kernel takes after the rows."""
        return self.rank_of, self.cost, self.before, self.after, self.lag

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.tables.cap)

    def scored(self, rows: Ints) -> Found:
        """The rows with both makespans; NEVER for a deadlock."""
        head, order = np.empty_like(self.cost), np.empty_like(self.cost)
        both = []
        for lag in (self.lag, self.stressed_lag):
            value = int(heads(rows, *self.graph[:4], lag, head, order))
            both.append(value if value >= 0 else NEVER)
        if self.congested and both[0] < NEVER:
            both[0] = self.replayed(rows)
        return Found(both[0], both[1], rows)

    @property
    def congested(self) -> bool:
        """Whether transfers may have to wait for the link: they occupy it longer than it takes to compute the next
        one, or stages share it. The search then looks at latencies only, but what it finds is judged by replays."""
        tables = self.tables
        slow = tables.transfer > tables.duration[:, :2].min()
        return bool(slow.any()) or (len(tables.stage_rank) > self.ranks and bool(tables.transfer.any()))

    def replayed(self, rows: Ints) -> int:
        """Makespan with the occupancy of links, nanoseconds."""
        tables, n = self.tables, self.tables.microbatches
        flat = rows.ravel()
        actions = np.stack([flat // n // 3, flat // n % 3, flat % n], axis=1)
        offsets = np.arange(self.ranks + 1, dtype=np.int64) * rows.shape[1]
        start, end = np.zeros(len(flat), np.int64), np.zeros(len(flat), np.int64)
        moved, cause = np.zeros((len(flat), 2), np.int64), np.zeros((len(flat), 2), np.int64)
        links = (tables.latency, tables.transfer, tables.link, self.ranks * self.ranks)
        replay(offsets, actions, tables.stage_rank, per_microbatch(tables, None), *links, start, end, moved, cause)
        return int(end.max())

    def memory(self, found: Found) -> int:
        """What counts as small: activations at the peaks and warm-ups, summed over the ranks. Warm-ups count beside
        the peaks because their activations are held longest."""
        forwards = found.rows // self.tables.microbatches % 3 == 0
        return int(peaks(found.rows, self.tables.microbatches).sum() + np.argmin(forwards, axis=1).sum())

    def fits(self, rows: Ints) -> bool:
        """Whether the rows keep the activation limits."""
        return bool((peaks(rows, self.tables.microbatches) <= self.tables.cap).all())


RECIPES = (
    # percent of the latencies, halves of a warm-up more for each stage to come, room for postponed W, patience
    (150, 1, "all", 0),
    (100, 1, "all", 50),
    (50, 1, 0, 0),
    (150, 2, "all", 0),
    (50, 1, 1, 50),
    (150, 0, "ranks", 0),
    (0, 0, 0, 100),
    (100, 0, "ranks", 100),
    (100, 6, "all", 0),
    (0, 2, 2, 50),
    (100, 2, "all", 0),
    (0, 0, 0, 0),
    (0, 0, "ranks", 50),
    (100, 4, 2, 50),
    (150, 6, "all", 0),
    (100, 2, 2, 0),
    (200, 2, "all", 0),
    (0, 0, 1, 100),
    (100, 0, 0, 0),
    (300, 1, "ranks", 50),
)
"""What list schedules are made of, in the order in which each added most on random and on published profiles."""


@dataclass(frozen=True)
class Recipe:
    """What the list scheduler takes: forwards to start with and activations, per rank; see list_schedule."""

    warm: Ints
    cap: Ints
    patience: int
    round_size: int = 0


def candidates(problem: Problem) -> Iterator[tuple[int, Ints]]:
    """Makespans and rows of list schedules by the recipes, the most promising first; those that get stuck are left out."""
    tables = problem.tables
    n, ranks = tables.microbatches, problem.ranks
    latency = tables.latency + tables.transfer
    rows = np.zeros((ranks, len(problem.cost) // ranks), np.int64)
    for recipe in recipes(tables) if len(tables.stage_rank) == ranks else interleaved_recipes(problem):
        kitchen = (tables.stage_rank, tables.duration, latency, n)
        value = list_schedule(*kitchen, recipe.warm, recipe.cap, recipe.patience, recipe.round_size, rows)
        if value < NEVER:
            yield int(value), rows.copy()


def recipes(tables: Tables) -> Iterator[Recipe]:
    """One stage a rank: warm-ups of Alg. 2 for several assumed latencies, with more slack or less, room for
    postponed weight gradients, and patience."""
    n, stages = tables.microbatches, len(tables.stage_rank)
    limit = np.minimum(tables.cap, n)
    room = {"all": n, "ranks": stages}
    for percent, spare, extra, patience in RECIPES:
        slack = adapted_slack(tables, percent)
        base = np.ones(stages, np.int64)
        base[:-1] += np.cumsum(slack[::-1])[::-1]
        base = np.minimum(base + np.arange(stages)[::-1] * spare // 2, n)
        cap = np.minimum(base + (room[extra] if isinstance(extra, str) else extra), limit)
        # a rank cannot be fed more forwards than the ranks before it may hold
        yield Recipe(np.minimum.accumulate(np.minimum(base, cap)), cap, patience)


def interleaved_recipes(problem: Problem) -> Iterator[Recipe]:
    """Several stages a rank: warm-ups that fall by 0 to 4 from rank to rank, on top of a multiple of what the interleaved
    order starts with, and rounds from as many microbatches as ranks (no link is slow) to all (the latency is hidden by
    everything there is to run)."""
    tables = problem.tables
    n, ranks = tables.microbatches, problem.ranks
    total = n * (len(tables.stage_rank) // ranks)
    limit = np.minimum(tables.cap, total)
    least = total // n - 1
    left = max(12, 100_000 // len(problem.cost))
    for extra in (total, ranks, 0):
        for patience in (0, 100):
            for base in (ranks, 3 * ranks, 2 * ranks, 5 * ranks // 2, 3 * ranks // 2, 4 * ranks):
                for fall in (4, 0, 2, 1):
                    for round_size in sorted({ranks, n, max(1, n // 2), 0}, reverse=True):
                        if left == 0:
                            return
                        left -= 1
                        warm = np.minimum(base * least + fall * np.arange(ranks)[::-1] + 1, total)
                        cap = np.minimum(warm + extra, limit)
                        yield Recipe(np.minimum(warm, cap), cap, patience, round_size)


def search(tables: Tables, seed: int = 0, known: Sequence[Ints] = ()) -> Found:
    """The best schedule found for the profile of the tables, with as little memory as keeps its makespan.

    ``known`` are further rows to start from; those that break a limit or a rule are left out.
    """
    problem = Problem.of(tables)
    start: list[tuple[int, int, Ints]] = []
    for rows in known:
        if problem.fits(rows):
            start.append((problem.scored(rows).makespan, -1, rows))
    for number, (value, rows) in enumerate(candidates(problem)):
        start.append((value, number, rows))
    if not start:
        raise AssertionError("a profile with at least one activation a stage has a schedule")
    start.sort(key=lambda c: c[:2])
    best = start[0][0]
    congested = problem.congested
    pool = [problem.scored(rows) for value, _, rows in start if congested or value <= best + best // TOLERANCE]
    if best > problem.bound or congested:
        pool += _improved(problem, start, seed)
    best = min(f.makespan for f in pool)
    near = [f for f in pool if f.makespan <= best + best // TOLERANCE]
    calm = min(f.stressed for f in near)
    near = [f for f in near if f.stressed <= calm + calm // STRESS_TOLERANCE]
    near.sort(key=lambda f: (problem.memory(f), f.stressed))
    return min((give_back(problem, f, best) for f in near[:FINALISTS]), key=problem.memory)


def _improved(problem: Problem, start: list[tuple[int, int, Ints]], seed: int) -> list[Found]:
    tables = problem.tables
    size = len(problem.cost)
    heat = int(tables.duration[:, :3].mean()) * 3 // 10
    found: list[Found] = []
    seen: set[int] = set()
    for value, _, rows in start:
        if value in seen:
            continue
        seen.add(value)
        trial = rows.copy()
        rest = (tables.microbatches, tables.cap, problem.bound)
        periodic_search(trial, *problem.graph, *rest, min(800, 350_000 // size), heat, seed + 1)
        tabu_search(trial, *problem.graph, *rest, min(60, 25_000 // size), seed + 1)
        found.append(problem.scored(trial))
        if found[-1].makespan <= problem.bound or len(seen) == STARTS:
            break
    return found


def give_back(problem: Problem, chosen: Found, best: int, tolerance: int = TOLERANCE) -> Found:
    """The chosen schedule with its peaks lowered as far as its makespan stays within tolerance of ``best`` (one part
    in ``tolerance``, 0: none), and
    its makespan under higher latencies within tolerance of what it was."""
    rows = chosen.rows.copy()
    rules = (
        problem.stressed_lag,
        problem.tables.microbatches,
        max(best + (best // tolerance if tolerance else 0), chosen.makespan),
        chosen.stressed + chosen.stressed // STRESS_TOLERANCE,
        max(20, 200_000 // len(problem.cost)),
    )
    trim_memory(rows, *problem.graph, *rules)
    trim_warmups(rows, *problem.graph, *rules)
    return problem.scored(rows)
