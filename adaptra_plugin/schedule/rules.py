"""The kernel that says whether a schedule keeps every rule; which one it breaks is for Schedule to find out."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.tables import Ints


@compiled
def keeps_rules(offsets: Ints, actions: Ints, stage_rank: Ints, microbatches: int) -> bool:
    """Whether actions ``[n, 3]`` of ranks ``offsets [ranks + 1]`` are a schedule, see Schedule for the rules."""
    ranks, stages = len(offsets) - 1, len(stage_rank)
    count = np.zeros((stages, 3), np.int64)
    for r in range(ranks):
        if offsets[r] == offsets[r + 1]:
            return False
        for n in range(offsets[r], offsets[r + 1]):
            stage, kind, microbatch = actions[n, 0], actions[n, 1], actions[n, 2]
            if stage_rank[stage] != r:
                return False
            slot = 1 if kind == 3 else kind
            if microbatch != count[stage, slot] or (kind > 0 and microbatch >= count[stage, slot - 1]):
                return False
            if kind == 3:
                if count[stage, 2] != count[stage, 1]:
                    return False
                count[stage, 2] += 1
            count[stage, slot] += 1
    for s in range(stages):
        if count[s, 0] != microbatches or count[s, 1] != microbatches or count[s, 2] != microbatches:
            return False
    done = np.zeros((2, stages), np.int64)
    at = offsets[:-1].copy()
    stack = np.arange(ranks)
    waiting = np.ones(ranks, np.bool_)
    top = ranks
    while top > 0:
        top -= 1
        r = stack[top]
        waiting[r] = False
        n = at[r]
        while n < offsets[r + 1]:
            stage, kind = actions[n, 0], actions[n, 1]
            if kind != 2:
                way = 0 if kind == 0 else 1
                source = stage - 1 if way == 0 else stage + 1
                if 0 <= source < stages and done[way, source] <= actions[n, 2]:
                    break
                done[way, stage] += 1
                to = stage + 1 if way == 0 else stage - 1
                if 0 <= to < stages and stage_rank[to] != r and not waiting[stage_rank[to]]:
                    waiting[stage_rank[to]] = True
                    stack[top] = stage_rank[to]
                    top += 1
            n += 1
        at[r] = n
    left = 0
    for r in range(ranks):
        left += offsets[r + 1] - at[r]
    return left == 0
