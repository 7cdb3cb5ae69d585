"""Periodic local search on a schedule: the same exchange in many microbatches at once.

In the steady state every microbatch repeats the pattern of the one before. When the pattern itself is what costs
time, an exchange for one microbatch gains nothing; the same exchange for all of them (or from one on, or for every
other) does.
"""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.graph import heads, overwrite
from adaptra_plugin.schedule.tables import Ints


@compiled
def exchange(
    rows: Ints, r: int, k: int, step: int, mode: int, microbatches: int, cap: int, after: Ints, out: Ints
) -> int:
    """Writes rank ``r``'s list with exchanges into ``out``; returns how many there are.

    The pattern is the action at ``k`` and the one ``step`` places later, both with kind and stage and their
    distance in microbatches. Wherever it occurs (mode 0), from here on (1), up to here (2), or here and at
    every other place (3), the later action moves before the earlier. Exchanges that break a rule are left out.
    """
    length = rows.shape[1]
    n, m = rows[r, k], rows[r, k + step]
    n_group, m_group = n // microbatches, m // microbatches
    distance = m % microbatches - n % microbatches
    for j in range(length):
        out[j] = rows[r, j]
    level = 0
    made = 0
    j = 0
    while j < length:
        u = out[j]
        hit = j + step < length and u // microbatches == n_group
        if hit:
            v = out[j + step]
            hit = v // microbatches == m_group and v % microbatches - u % microbatches == distance
        if hit and mode == 1:
            hit = j >= k
        elif hit and mode == 2:
            hit = j <= k
        elif hit and mode == 3:
            hit = (u % microbatches - n % microbatches) % 2 == 0
        if hit:
            v = out[j + step]
            kind = m_group % 3
            rise = level + (1 if kind == 0 else (-1 if kind == 2 else 0))
            hit = rise <= cap
            for i in range(j, j + step):
                x = out[i]
                if x // microbatches == m_group or after[x] == v or after[v] == x:
                    hit = False
                if x % microbatches == v % microbatches and x // microbatches // 3 == m_group // 3:
                    hit = False
                x_kind = x // microbatches % 3
                rise += 1 if x_kind == 0 else (-1 if x_kind == 2 else 0)
                if rise > cap:
                    hit = False
            if hit:
                for i in range(j + step, j, -1):
                    out[i] = out[i - 1]
                out[j] = v
                made += 1
        kind = out[j] // microbatches % 3
        level += 1 if kind == 0 else (-1 if kind == 2 else 0)
        j += 1
    return made


@compiled
def periodic_search(
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
    heat: int,
    seed: int,
) -> int:
    """Improves ``rows`` in place by at most ``rounds`` trials or until the makespan is ``goal``; returns the makespan.

    Threshold accepting: a trial stays when the makespan is at most the current one plus a threshold that falls
    from ``heat`` nanoseconds to zero. Deterministic for a seed.
    """
    ranks, length = rows.shape
    count = len(cost)
    head, order = np.empty(count, np.int64), np.empty(count, np.int64)
    old, new = np.empty(length, np.int64), np.empty(length, np.int64)
    best_rows = rows.copy()
    now = heads(rows, rank_of, cost, before, after, lag, head, order)
    best = now
    state = seed * 2654435761 % 2147483647 + 1
    for turn in range(rounds):
        if best <= goal:
            break
        state = state * 16807 % 2147483647
        r = state % ranks
        state = state * 16807 % 2147483647
        step = 1 + (state // 8) % 2 + (1 if state % 8 == 0 else 0)
        state = state * 16807 % 2147483647
        k = state % max(1, length - step)
        if k + step >= length:
            continue
        state = state * 16807 % 2147483647
        mode = (state // 4) % 4
        if exchange(rows, r, k, step, mode, microbatches, cap[r], after, new) == 0:
            continue
        for k in range(length):
            old[k], rows[r, k] = rows[r, k], new[k]
        value = heads(rows, rank_of, cost, before, after, lag, head, order)
        if value < 0 or value > now + heat * (rounds - turn) // rounds:
            for k in range(length):
                rows[r, k] = old[k]
            continue
        now = value
        if value < best:
            best = value
            overwrite(best_rows, rows)
    overwrite(rows, best_rows)
    return best
