"""A lower bound on the makespan of every in-order schedule, and what it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.tables import NS, Tables, tabulate


@dataclass(frozen=True)
class Bound:
    """``ms`` no schedule can beat, and the stage or link (in words) that it comes from."""

    ms: float
    source: str


def lower_bound(profile: Profile) -> Bound:
    """The longest of these chains, over all stages (sec. 4.1 gives the first for one stage; the others are ours).

    *Work*: nothing runs on a stage before microbatch 0 has reached it; then it computes F + I + W of all microbatches.
    *Drain*: the gradient of the last microbatch has still to travel to stage 0 and to become its W.
    *Round trip*: the first I of a stage comes after F to the end of the pipeline and I back; until then the stage
    runs forwards only, no more than its limit allows (*memory* where the limit is what leaves it idle).
    *Occupancy*: a link takes one transfer at a time.
    *Memory*: with room for K activations, F of microbatch m + K starts after W of m has ended, so that
    ``floor((N - 1) / K)`` round trips follow one another.

    Valid for every schedule that keeps microbatches in order, without any assumption on warm-ups. Transfers count
    with latency and occupancy. With several stages a rank the limit is not used, and work is that of the rank.
    """
    return bound_of(tabulate(profile))


def bound_of(tables: Tables) -> Bound:
    """``lower_bound`` on tables."""
    ns, source = bound_ns(tables)
    return Bound(ns / NS, source)


def bound_ns(tables: Tables) -> tuple[int, str]:
    """``lower_bound`` in whole nanoseconds, and its source."""
    d, lat = tables.duration, tables.latency + tables.transfer
    n, stages = tables.microbatches, len(tables.stage_rank)
    ranks = int(tables.stage_rank.max()) + 1
    head, tail = np.zeros(stages, np.int64), np.zeros(stages, np.int64)
    for s in range(1, stages):
        head[s] = head[s - 1] + d[s - 1, 0] + lat[0, s]
    tail[0] = d[0, 2]
    for s in range(1, stages):  # from the end of I on s: the gradient's way home, or the stage's own W
        tail[s] = max(lat[1, s - 1] + d[s - 1, 1] + tail[s - 1], d[s, 2])
    back = np.zeros(stages, np.int64)  # from the end of F on s to the start of I on s, one microbatch alone
    for s in range(stages - 2, -1, -1):
        back[s] = lat[0, s + 1] + d[s + 1, 0] + back[s + 1] + d[s + 1, 1] + lat[1, s]
    found: list[tuple[int, str]] = []
    for rank in range(ranks):
        mine = [s for s in range(stages) if tables.stage_rank[s] == rank]
        name = f"stage {mine[0]}" if len(mine) == 1 else f"stages {', '.join(map(str, mine))}"
        work = n * sum(int(d[s, :3].sum()) for s in mine)
        found.append((min(int(head[s]) for s in mine) + work, f"work of {name}"))
    for s in range(stages):
        f, i, w = (int(t) for t in d[s, :3])
        start, end = int(head[s]), int(tail[s])
        found.append((start + n * (f + i) + end, f"drain of stage {s}"))
        first_i = start + f + int(back[s])
        limited = ranks == stages and int(tables.cap[s]) < n
        early = min(n, int(tables.cap[s])) if ranks == stages else n  # forwards that fit before the first I
        why = f"memory of stage {s} ({early} activations)" if limited else f"round trip from {_way(tables, s)}"
        found.append((first_i + n * i + (n - early) * f + max(end, n * w), why))
        if limited:
            trip = f + int(back[s]) + i
            turns, rest = divmod(n - 1, early)
            found.append((start + turns * (trip + w) + trip + rest * max(f, i) + end, why))
        # a link takes one transfer at a time, and the last one has the rest of its way to go
        if s + 1 < stages and ranks == stages:
            out, home = int(tables.transfer[0, s + 1]), int(tables.transfer[1, s])
            ahead = start + f + int(tables.latency[0, s + 1])
            rest_out = int(d[s + 1, 0] + back[s + 1] + d[s + 1, 1] + tail[s + 1])
            found.append((ahead + n * out + rest_out, f"occupancy of link {s}-{s + 1}"))
            first_home = start + f + int(back[s]) - int(lat[1, s])
            rest_home = int(tables.latency[1, s]) + i + end
            found.append((first_home + n * home + rest_home, f"occupancy of link {s + 1}-{s}"))
    return max(found, key=lambda chain: chain[0])


def _way(tables: Tables, stage: int) -> str:
    """The stage, with the slowest link that its round trip crosses."""
    after = [
        (int(tables.latency[0, s] + tables.transfer[0, s] + tables.latency[1, s - 1]), s)
        for s in range(stage + 1, len(tables.stage_rank))
    ]
    slowest, at = max(after, default=(0, 0))
    return f"stage {stage} over link {at - 1}-{at}" if slowest else f"stage {stage}"
