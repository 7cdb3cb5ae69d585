"""Kernels on the precedence graph of given action lists: earliest starts, and the longest way to the end.

Actions are numbered ``(stage * 3 + kind) * microbatches + microbatch``. Of each microbatch, F and I form one
chain through the pipeline and back; W hangs on I, which the order of the rank keeps. Only whole latencies count:
transfers overlap.
"""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.tables import Ints, Tables


def chains(tables: Tables) -> tuple[Ints, Ints, Ints]:
    """``before [n]`` and ``after [n]``, the neighbours on the microbatch's chain (-1: none), and ``lag [n]``, the
    nanoseconds from the end of the one before to the earliest start."""
    stages, count = len(tables.stage_rank), tables.microbatches
    number = np.arange(stages * 3 * count, dtype=np.int64).reshape(stages, 3, count)
    before: Ints = np.full_like(number, -1)
    lag: Ints = np.zeros_like(number)
    latency = tables.latency + tables.transfer
    before[1:, 0], lag[1:, 0] = number[:-1, 0], latency[0, 1:, None]
    before[:-1, 1], lag[:-1, 1] = number[1:, 1], latency[1, :-1, None]
    before[-1, 1] = number[-1, 0]
    after = np.full(number.size, -1, np.int64)
    flat = before.ravel()
    after[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    return flat.copy(), after, lag.ravel().copy()


@compiled
def heads(rows: Ints, rank_of: Ints, cost: Ints, before: Ints, after: Ints, lag: Ints, head: Ints, order: Ints) -> int:
    """Earliest start of every action into ``head``, a topological order into ``order``; returns the makespan.

    ``rows [rank, actions]``; ``rank_of, cost, before, after, lag [n]``. Returns -1 for a deadlock.
    """
    ranks, length = rows.shape
    at = np.zeros(ranks, np.int64)
    free = np.zeros(ranks, np.int64)
    stack = np.empty(ranks, np.int64)
    stacked = np.ones(ranks, np.bool_)
    for j in range(ranks):
        stack[j] = ranks - 1 - j
    top = ranks
    head[:] = -1
    done = 0
    makespan = 0
    while top > 0:
        top -= 1
        r = stack[top]
        stacked[r] = False
        k = at[r]
        time = free[r]
        while k < length:
            n = rows[r, k]
            b = before[n]
            if b >= 0:
                if head[b] < 0:
                    break
                arrival = head[b] + cost[b] + lag[n]
                if arrival > time:
                    time = arrival
            head[n] = time
            order[done] = n
            done += 1
            time += cost[n]
            a = after[n]
            if a >= 0:
                t = rank_of[a]
                if t != r and not stacked[t]:
                    stacked[t] = True
                    stack[top] = t
                    top += 1
            k += 1
        at[r] = k
        free[r] = time
        if time > makespan:
            makespan = int(time)
    return makespan if done == len(head) else -1


@compiled
def tails(rows: Ints, cost: Ints, after: Ints, lag: Ints, order: Ints, tail: Ints, follower: Ints, place: Ints) -> None:
    """Longest way from the start of every action to the end of the schedule into ``tail``.

    Also written: ``follower [n]``, the next action of the same rank (-1: none), and ``place [n]``, its position.
    """
    ranks, length = rows.shape
    for r in range(ranks):
        for k in range(length):
            n = rows[r, k]
            place[n] = k
            follower[n] = rows[r, k + 1] if k + 1 < length else -1
    for k in range(len(order) - 1, -1, -1):
        n = order[k]
        longest = 0
        if follower[n] >= 0:
            longest = tail[follower[n]]
        a = after[n]
        if a >= 0 and tail[a] + lag[a] > longest:
            longest = tail[a] + lag[a]
        tail[n] = longest + cost[n]


@compiled
def overwrite(rows: Ints, other: Ints) -> None:
    """``rows [:] = other`` for equal shapes, by loops: numba takes seconds to compile the assignment of one array to another, with
    the text of the error for shapes that differ."""
    for r in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            rows[r, k] = other[r, k]
