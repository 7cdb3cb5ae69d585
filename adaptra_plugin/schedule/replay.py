"""The kernel that runs given action lists in order and says when each action and each transfer happened."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.tables import Ints

NONE = -1


@compiled
def replay(
    offsets: Ints,
    actions: Ints,
    stage_rank: Ints,
    duration: Ints,
    latency: Ints,
    transfer: Ints,
    queue: Ints,
    queues: int,
    start: Ints,
    end: Ints,
    moved: Ints,
    cause: Ints,
) -> int:
    """Runs the schedule; returns how many actions ran (fewer than given: deadlock).

    ``offsets [ranks + 1]``, ``actions [n, 3]``: see Schedule.table. ``duration [stage, kind, microbatch]``;
    ``latency, transfer, queue [2, stage]``: see Tables; transfers of one queue occupy it one after another, in the
    order in which they became ready. Written, one entry an action: ``start, end [n]``; ``moved [n, 2]``, when the
    transfer of its output got the link and when it arrived; ``cause [n, 2]``, the action whose output it waited for
    and the action whose transfer held the link before its own (-1: none).

    Events are taken in order of time: an action that is started later never ends before the one taken now, so the
    queues see transfers in the order in which they become ready.
    """
    ranks = len(offsets) - 1
    stages = len(stage_rank)
    microbatches = duration.shape[2]
    at = offsets[:-1].copy()
    running = np.zeros(ranks, np.bool_)
    free = np.zeros(ranks, np.int64)
    arrived = np.full((2, stages, microbatches), NONE, np.int64)
    source = np.full((2, stages, microbatches), NONE, np.int64)
    queue_free = np.zeros(queues + 1, np.int64)
    queue_last = np.full(queues + 1, NONE, np.int64)
    retry = np.zeros(ranks + 3, np.int64)
    waiting = ranks
    for rank in range(ranks):
        retry[rank] = rank
    done = 0
    while True:
        for k in range(waiting):
            rank = retry[k]
            if running[rank] or at[rank] == offsets[rank + 1]:
                continue
            n = at[rank]
            stage, kind, microbatch = actions[n, 0], actions[n, 1], actions[n, 2]
            begin = free[rank]
            cause[n, 0] = NONE
            if (kind == 0 and stage > 0) or ((kind == 1 or kind == 3) and stage < stages - 1):
                way = 0 if kind == 0 else 1
                if source[way, stage, microbatch] == NONE:
                    continue
                begin = max(begin, arrived[way, stage, microbatch])
                cause[n, 0] = source[way, stage, microbatch]
            start[n] = begin
            end[n] = begin + duration[stage, kind, microbatch]
            running[rank] = True
        best = NONE
        for rank in range(ranks):
            if running[rank] and (best == NONE or end[at[rank]] < end[at[best]]):
                best = rank
        if best == NONE:
            return done
        n = at[best]
        now = end[n]
        stage, kind, microbatch = actions[n, 0], actions[n, 1], actions[n, 2]
        free[best] = now
        running[best] = False
        at[best] += 1
        done += 1
        waiting = 1
        retry[0] = best
        moved[n, 0] = now
        moved[n, 1] = now
        cause[n, 1] = NONE
        to = stage + 1 if kind == 0 else stage - 1
        if kind != 2 and 0 <= to < stages:
            way = 0 if kind == 0 else 1
            q = queue[way, to]
            if q >= 0:  # a transfer that takes no time waits for its turn too
                if queue_free[q] > now:
                    moved[n, 0] = queue_free[q]
                    cause[n, 1] = queue_last[q]
                queue_free[q] = moved[n, 0] + transfer[way, to]
                queue_last[q] = n
            moved[n, 1] = moved[n, 0] + transfer[way, to] + latency[way, to]
            arrived[way, to, microbatch] = moved[n, 1]
            source[way, to, microbatch] = n
            retry[1] = stage_rank[to]
            waiting = 2
