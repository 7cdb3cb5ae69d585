"""Local search on action lists: tabu search that moves actions to the ends of critical blocks.

The neighbourhood is N6 of job-shop scheduling (Balas and Vazacopoulos, "Guided Local Search with Shifting
Bottleneck for Job Shop Scheduling", Management Science 1998), moves are compared by Taillard's estimate ("Parallel
Taboo Search Techniques for the Job Shop Scheduling Problem", ORSA J. Computing 1994). Pipelines add: kinds keep the
order of microbatches, and an activation limit, which on one rank is a bound on every prefix of its list.
"""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.graph import heads, overwrite, tails
from adaptra_plugin.schedule.tables import Ints

REACH = 10
"""Actions at each end of a critical block that are tried."""


@compiled
def allowed(
    rows: Ints, r: int, low: int, high: int, leftwards: bool, held: Ints, cap: int, microbatches: int, after: Ints
) -> bool:
    """Whether the action at ``high`` may move before the one at ``low`` (``leftwards``), or that at ``low`` after
    the one at ``high``; ``held [rank, position]`` counts activations after each position."""
    n = rows[r, high] if leftwards else rows[r, low]
    group = n // microbatches
    kind = group % 3
    raises = (leftwards and kind == 0) or (not leftwards and kind == 2)
    if raises and leftwards and (held[r, low - 1] if low > 0 else 0) + 1 > cap:
        return False
    first, last = (low, high - 1) if leftwards else (low + 1, high)
    for k in range(first, last + 1):
        m = rows[r, k]
        other = m // microbatches
        if other == group:
            return False
        if m % microbatches == n % microbatches and other // 3 == group // 3:
            return False  # F, I and W of one microbatch keep their order
        if after[m] == n or after[n] == m:
            return False
        if raises and held[r, k] + 1 > cap:
            return False
    return True


@compiled
def estimate(
    rows: Ints,
    r: int,
    low: int,
    high: int,
    leftwards: bool,
    cost: Ints,
    before: Ints,
    after: Ints,
    lag: Ints,
    head: Ints,
    tail: Ints,
    early: Ints,
) -> int:
    """Longest way through the actions of the segment after the move, with everything outside as it was."""
    size = high - low + 1
    length = rows.shape[1]
    time = 0
    if low > 0:
        p = rows[r, low - 1]
        time = head[p] + cost[p]
    for j in range(size):
        k = (high if j == 0 else low + j - 1) if leftwards else (low if j == size - 1 else low + j + 1)
        n = rows[r, k]
        b = before[n]
        if b >= 0:
            time = max(time, head[b] + cost[b] + lag[n])
        early[j] = time
        time += cost[n]
    rest = tail[rows[r, high + 1]] if high + 1 < length else 0
    longest = 0
    for j in range(size - 1, -1, -1):
        k = (high if j == 0 else low + j - 1) if leftwards else (low if j == size - 1 else low + j + 1)
        n = rows[r, k]
        a = after[n]
        if a >= 0:
            rest = max(rest, lag[a] + tail[a])
        rest += cost[n]
        longest = max(longest, early[j] + rest)
    return longest


@compiled
def shift(rows: Ints, r: int, low: int, high: int, leftwards: bool) -> None:
    """Carries out the move."""
    if leftwards:
        n = rows[r, high]
        for k in range(high, low, -1):
            rows[r, k] = rows[r, k - 1]
        rows[r, low] = n
    else:
        n = rows[r, low]
        for k in range(low, high):
            rows[r, k] = rows[r, k + 1]
        rows[r, high] = n


@compiled
def tabu_search(
    rows: Ints,
    rank_of: Ints,
    cost: Ints,
    before: Ints,
    after: Ints,
    lag: Ints,
    microbatches: int,
    cap: Ints,
    goal: int,
    rounds: int,
    seed: int,
) -> int:
    """Improves ``rows`` in place for at most ``rounds`` moves or until the makespan is ``goal``; returns the makespan.

    Deterministic for a seed. ``rows`` must be free of deadlock and within ``cap [rank]``.
    """
    ranks, length = rows.shape
    count = len(cost)
    head, tail = np.empty(count, np.int64), np.zeros(count, np.int64)
    order, follower, place = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    held = np.zeros((ranks, length), np.int64)
    early = np.empty(2 * REACH + 2, np.int64)
    barred = np.zeros((2, count), np.int64)
    path = np.empty(count, np.int64)
    best_rows = rows.copy()
    makespan = heads(rows, rank_of, cost, before, after, lag, head, order)
    best = makespan
    state = seed * 2654435761 % 2147483647 + 1
    stale = 0
    for turn in range(1, rounds + 1):
        if best <= goal:
            break
        tails(rows, cost, after, lag, order, tail, follower, place)
        for r in range(ranks):
            level = 0
            for k in range(length):
                kind = rows[r, k] // microbatches % 3
                level += 1 if kind == 0 else (-1 if kind == 2 else 0)
                held[r, k] = level
        # one critical path, where it forks by chance
        n = -1
        for r in range(ranks):
            m = rows[r, 0]
            if head[m] == 0 and tail[m] == makespan:
                n = m
                break
        steps = 0
        while n >= 0:
            path[steps] = n
            steps += 1
            done = head[n] + cost[n]
            rest = tail[n] - cost[n]
            f, a = follower[n], after[n]
            by_rank = f >= 0 and head[f] == done and tail[f] == rest
            by_chain = a >= 0 and head[a] == done + lag[a] and tail[a] + lag[a] == rest and a != f
            if by_rank and by_chain:
                state = state * 16807 % 2147483647
                by_rank = state % 2 == 0
            n = f if by_rank else (a if by_chain else -1)
        found = 1 << 62
        move_r = move_low = move_high = -1
        move_left = False
        begin = 0
        while begin < steps:
            r = rank_of[path[begin]]
            finish = begin
            while finish + 1 < steps and follower[path[finish]] == path[finish + 1]:
                finish += 1
            low, high = place[path[begin]], place[path[finish]]
            if high > low:
                for side in range(2):
                    for j in range(1, min(REACH, high - low) + 1):
                        for leftwards in (True, False):
                            # to the front of the block, or behind its end; or one step, inside the reach
                            if side == 0:
                                a_, b_ = (low, low + j) if leftwards else (low + j - 1, low + j)
                            else:
                                a_, b_ = (high - j, high - j + 1) if leftwards else (high - j, high)
                            n = rows[r, b_] if leftwards else rows[r, a_]
                            if not allowed(rows, r, a_, b_, leftwards, held, cap[r], microbatches, after):
                                continue
                            value = estimate(rows, r, a_, b_, leftwards, cost, before, after, lag, head, tail, early)
                            state = state * 16807 % 2147483647
                            if barred[0 if leftwards else 1, n] >= turn and value >= best:
                                continue
                            if value < found or (value == found and state % 3 == 0):
                                found = value
                                move_r, move_low, move_high, move_left = r, a_, b_, leftwards
            begin = finish + 1
        if move_r < 0:
            stale += 1
            for n in range(count):  # nothing is left to try: forget
                barred[0, n] = barred[1, n] = 0
            if stale > 3:
                break
            continue
        n = rows[move_r, move_high] if move_left else rows[move_r, move_low]
        shift(rows, move_r, move_low, move_high, move_left)
        state = state * 16807 % 2147483647
        tenure = 8 + state % 8
        now = heads(rows, rank_of, cost, before, after, lag, head, order)
        if now < 0:  # a cycle through other ranks
            shift(rows, move_r, move_low, move_high, not move_left)
            barred[0 if move_left else 1, n] = turn + 4 * tenure
            makespan = heads(rows, rank_of, cost, before, after, lag, head, order)
            continue
        makespan = now
        barred[1 if move_left else 0, n] = turn + tenure
        if makespan < best:
            best = makespan
            stale = 0
            overwrite(best_rows, rows)
    overwrite(rows, best_rows)
    return best
