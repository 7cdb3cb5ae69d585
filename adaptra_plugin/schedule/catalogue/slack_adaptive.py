"""Slack-adaptive schedules: list-scheduled candidates, scored by makespan, then as little memory as reaches it."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.listing import list_schedule
from adaptra_plugin.schedule.tables import Ints, Tables


def warmups(tables: Tables, percent: int) -> Ints:
    """Alg. 2 from the last stage backwards, with ``percent`` of the latencies: ``x_i = x_{i+1} + D_i`` and
    ``D_i = max(1, ceil((F_i + I_i + c_f + c_b) / (F_{i+1} + I_{i+1})))``, at most the microbatches."""
    d, lat = tables.duration, tables.latency + tables.transfer
    stages = len(tables.stage_rank)
    x = np.ones(stages, np.int64)
    for s in range(stages - 2, -1, -1):
        need = int(d[s, 0] + d[s, 1]) * min(percent, 100) // 100 + int(lat[0, s + 1] + lat[1, s]) * percent // 100
        slack = max(1, -(-need // max(1, int(d[s + 1, 0] + d[s + 1, 1]))))
        x[s] = x[s + 1] + slack
    return np.minimum(x, tables.microbatches)


def words_of(tables: Tables) -> tuple[int, Ints]:
    """The best candidate's makespan in nanoseconds and its kind codes ``[stage, 3 * microbatches]``."""
    n, stages = tables.microbatches, len(tables.stage_rank)
    latency = tables.latency + tables.transfer
    limit = np.minimum(tables.cap, n)
    words = np.zeros((stages, 3 * n), np.int64)

    def attempt(warm: Ints, cap: Ints, patience: int) -> int:
        return int(list_schedule(tables.duration, latency, n, np.minimum(warm, cap), cap, patience, words))

    tried: list[tuple[int, Ints, Ints, int]] = []
    for percent in (0, 25, 50, 75, 90, 100, 110, 125, 150, 200, 300):
        warm = warmups(tables, percent)
        for extra in (0, 1, 2, stages, n):
            cap = np.minimum(warm + extra, limit)
            for patience in (0, 50, 100):
                tried.append((attempt(warm, cap, patience), warm, cap, patience))
    best = min(item[0] for item in tried)
    goal = best + best // 500
    _, warm, cap, patience = min((t for t in tried if t[0] <= goal), key=lambda t: (int(t[2].sum()), t[0]))
    warm, cap = warm.copy(), cap.copy()
    shrinking = True
    while shrinking:  # give memory back, one activation of one stage at a time, while the makespan stays
        shrinking = False
        for s in range(stages):
            for table in (warm, cap):
                while table[s] > 1:
                    table[s] -= 1
                    if attempt(warm, cap, patience) > goal:
                        table[s] += 1
                        break
                    shrinking = True
    return attempt(warm, cap, patience), words.copy()
