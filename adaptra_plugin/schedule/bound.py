"""A lower bound on the makespan of every in-order schedule, and what it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.tables import NS, UNLIMITED, Tables, tabulate


@dataclass(frozen=True)
class Bound:
    """``ms`` no schedule can beat, and the stage or link (in words) that it comes from."""

    ms: float
    source: str


def lower_bound(profile: Profile) -> Bound:
    """The longest of three chains, over all stages; with one stage a rank.

    *Work*: nothing runs on a stage before microbatch 0 has reached it; it computes F + I + W of all microbatches.
    *Drain*: after the last I of a stage its gradient has to travel to stage 0, whose W of that microbatch is last.
    *Memory*: with room for K activations, F of microbatch m + K starts after W of m has ended, so at least
    ``floor((N - 1) / K)`` round trips (F to the end of the pipeline, I back, W) follow one another.
    """
    return bound_of(tabulate(profile))


def bound_of(tables: Tables) -> Bound:
    """``lower_bound`` on tables."""
    ns, source = _longest(tables)
    return Bound(ns / NS, source)


def _longest(tables: Tables) -> tuple[int, str]:
    d, lat = tables.duration, tables.latency + tables.transfer
    n, stages = tables.microbatches, len(tables.stage_rank)
    ranks = int(tables.stage_rank.max()) + 1
    head, tail = np.zeros(stages, np.int64), np.zeros(stages, np.int64)
    for s in range(1, stages):
        head[s] = head[s - 1] + d[s - 1, 0] + lat[0, s]
    tail[0] = d[0, 2]
    for s in range(1, stages):  # from the end of I on s: the gradient's way home, or the stage's own W
        tail[s] = max(lat[1, s - 1] + d[s - 1, 1] + tail[s - 1], d[s, 2])
    best = (0, "nothing")
    for rank in range(ranks):
        mine = [s for s in range(stages) if tables.stage_rank[s] == rank]
        work = n * int(sum(d[s, :3].sum() for s in mine))
        first = min(int(head[s]) for s in mine)
        name = f"stage {mine[0]}" if len(mine) == 1 else f"stages {', '.join(map(str, mine))}"
        best = max(best, (first + work, f"work of {name}"), key=lambda c: c[0])
    back = np.zeros(stages, np.int64)  # from the start of F on s to the start of I on s, one microbatch alone
    for s in range(stages - 2, -1, -1):
        back[s] = lat[0, s + 1] + d[s + 1, 0] + back[s + 1] + d[s + 1, 1] + lat[1, s]
    for s in range(stages):
        trip = int(d[s, 0] + back[s] + d[s, 1])
        before_last_i = int(head[s]) + n * int(d[s, 0] + d[s, 1])
        alone = [(before_last_i + int(tail[s]), f"drain of stage {s}")]
        # the first I comes a round trip after the first F, and N I's, and the drain, follow
        alone.append((int(head[s]) + trip + (n - 1) * int(d[s, 1]) + int(tail[s]), f"round trip from stage {s}"))
        if tables.cap[tables.stage_rank[s]] < UNLIMITED and ranks == stages:
            k = int(tables.cap[s])
            full, rest = divmod(n - 1, k)
            cycle = max(trip + int(d[s, 2]), k * int(d[s, :3].sum()))
            chain = full * cycle + trip + rest * int(d[s, :2].max()) + int(tail[s])
            alone.append((int(head[s]) + chain, f"memory of stage {s} ({k} activations)"))
        for item in alone:
            best = max(best, item, key=lambda c: c[0])
    return best
