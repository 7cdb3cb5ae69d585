"""The kernel that writes schedules: a list scheduler (full order of sec. 4.3), for any number of stages a rank."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.tables import Ints

NEVER = 1 << 62


@compiled
def turn_of(microbatch: int, depth: int, stages: int, round_size: int) -> int:
    """Smaller is taken first: by rounds of microbatches, then by depth; without rounds, the deepest."""
    if round_size == 0:
        return stages - depth
    return ((microbatch // round_size) * stages + depth) * round_size + microbatch % round_size


@compiled
def list_schedule(
    stage_rank: Ints,
    duration: Ints,
    latency: Ints,
    microbatches: int,
    warm: Ints,
    cap: Ints,
    patience: int,
    round_size: int,
    rows: Ints,
) -> int:
    """Writes action numbers into ``rows`` and returns the makespan in nanoseconds (NEVER: it got stuck).

    A rank runs only F until it has ``warm[rank]`` of them (or all); from then on, of what is ready, I before F
    before W (sec. 4.3 of the paper). F also needs fewer than ``cap[rank]`` activations held and at most
    ``warm[rank]`` microbatches between F and I. A rank that could only run W waits instead for an I or F that is
    known to arrive within ``patience`` percent of the W.

    With several stages a rank, an F leaves one place free for each later stage of its rank, or the microbatches
    under way could not leave the pipeline. Of several F, the first by rounds of ``round_size`` microbatches is taken
    (as many as ranks: the interleaved order; more hide the latency of a link), or the latest stage where that is 0; of
    several I likewise, mirrored.

    ``duration [stage, kind]``, ``latency [2, stage]``: see Tables; ``rows [rank, 3 * microbatches * stages a rank]``
    receives ``(stage * 3 + kind) * microbatches + microbatch``. Decisions are taken in order of time.
    """
    stages, ranks = len(stage_rank), len(warm)
    deeper = np.zeros(stages, np.int64)  # later stages of the same rank
    above = np.full(stages, -1, np.int64)  # the stage before it on the same rank
    first = np.full(ranks, -1, np.int64)
    last = np.full(ranks, -1, np.int64)
    for s in range(stages):
        r = stage_rank[s]
        if first[r] < 0:
            first[r] = s
        above[s] = last[r]
        last[r] = s
        for t in range(s):
            if stage_rank[t] == r:
                deeper[t] += 1
    count = np.zeros((stages, 3), np.int64)
    total = np.zeros((ranks, 3), np.int64)
    length = np.zeros(ranks, np.int64)
    free = np.zeros(ranks, np.int64)
    ready = np.full((2, stages, microbatches), NEVER, np.int64)
    ready[0, 0, :] = 0
    # when each rank decides next, and what it would run; recomputed for the ranks that an action concerns
    when = np.full(ranks, NEVER, np.int64)
    what = np.zeros((ranks, 2), np.int64)
    touched = np.ones(ranks, np.bool_)
    makespan = 0
    strict = True
    left = 3 * microbatches * stages
    while left > 0:
        for r in range(ranks):
            if not touched[r]:
                continue
            touched[r] = False
            held = total[r, 0] - total[r, 2]
            under_way = total[r, 0] - total[r, 1]
            backwards = not strict or total[r, 0] >= warm[r] or total[r, 1] > 0 or held >= cap[r]
            at = NEVER
            stage, kind, key = -1, 0, 0
            w_stage, w_key = -1, NEVER
            s = last[r]
            while s >= 0:
                f, i, w = count[s, 0], count[s, 1], count[s, 2]
                if f < microbatches and held + deeper[s] < cap[r] and (under_way < warm[r] or s > first[r]):
                    time = max(free[r], ready[0, s, f])
                    rank_key = turn_of(f, s, stages, round_size)
                    if time < NEVER and (time < at or (time == at and kind == 0 and rank_key < key)):
                        at, stage, kind, key = time, s, 0, rank_key
                if i < f and (backwards or total[r, 0] == microbatches * (deeper[first[r]] + 1)):
                    time = max(free[r], ready[1, s, i])
                    rank_key = turn_of(i, stages - 1 - s, stages, round_size)
                    if time < NEVER and (time < at or (time == at and (kind == 0 or rank_key < key))):
                        at, stage, kind, key = time, s, 1, rank_key
                if w < i and w < w_key:
                    w_stage, w_key = s, w
                s = above[s]
            # only a known arrival is worth waiting for
            if w_stage >= 0 and (at >= NEVER or 100 * (at - free[r]) > patience * duration[w_stage, 2]):
                at, stage, kind = free[r], w_stage, 2
            when[r] = at
            what[r, 0], what[r, 1] = stage, kind
        r = 0
        for k in range(1, ranks):
            if when[k] < when[r]:
                r = k
        if when[r] >= NEVER:
            if not strict:
                return NEVER
            strict = False  # limits elsewhere keep forwards away: from here on no rank waits for its warm-up
            touched[:] = True
            continue
        s, kind = what[r, 0], what[r, 1]
        n = count[s, kind]
        rows[r, length[r]] = (s * 3 + kind) * microbatches + n
        length[r] += 1
        count[s, kind] += 1
        total[r, kind] += 1
        left -= 1
        done = when[r] + duration[s, kind]
        free[r] = done
        makespan = max(makespan, done)
        touched[r] = True
        if kind == 0:
            if s == stages - 1:
                ready[1, s, n] = done
            else:
                ready[0, s + 1, n] = done + latency[0, s + 1]
                touched[stage_rank[s + 1]] = True
        elif kind == 1 and s > 0:
            ready[1, s - 1, n] = done + latency[1, s - 1]
            touched[stage_rank[s - 1]] = True
    return makespan
