"""The kernel that writes schedules: a list scheduler for one stage a rank (full order of sec. 4.3)."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.tables import Ints

NEVER = 1 << 62


@compiled
def list_schedule(
    duration: Ints,
    latency: Ints,
    microbatches: int,
    warm: Ints,
    cap: Ints,
    patience: int,
    words: Ints,
) -> int:
    """Writes kind codes into ``words [stage, 3 * microbatches]`` and returns the makespan in nanoseconds.

    A stage runs only F until it has ``warm[stage]`` of them (or all); from then on, of what is ready, I before F
    before W (sec. 4.3 of the paper). F also needs fewer than ``cap[stage]`` activations held and at most
    ``warm[stage]`` microbatches between F and I. A stage that could only run W waits instead for an I or F that is
    known to arrive within ``patience`` percent of the W.

    ``duration [stage, kind]``, ``latency [2, stage]``: see Tables. Decisions are taken in order of time.
    """
    stages = len(warm)
    count = np.zeros((stages, 3), np.int64)
    length = np.zeros(stages, np.int64)
    free = np.zeros(stages, np.int64)
    ready = np.full((2, stages, microbatches), NEVER, np.int64)
    ready[0, 0, :] = 0
    # when each stage decides next, and what it would run; recomputed for the stages that an action concerns
    when = np.full(stages, NEVER, np.int64)
    what = np.full(stages, -1, np.int64)
    touched = np.zeros(stages, np.bool_)
    touched[0] = True
    makespan = 0
    left = 3 * microbatches * stages
    while left > 0:
        for s in range(stages):
            if not touched[s]:
                continue
            touched[s] = False
            f, i, w = count[s, 0], count[s, 1], count[s, 2]
            at_f = at_i = NEVER
            if f < microbatches and f - w < cap[s] and f - i < warm[s]:
                at_f = max(free[s], ready[0, s, f])
            if i < f and (f == microbatches or f >= warm[s] or i > 0 or f - w >= cap[s]):
                at_i = max(free[s], ready[1, s, i])
            at = min(at_f, at_i)
            kind = 1 if at_i <= at_f else 0
            if w < i and at > free[s]:
                wait = at - free[s]
                # wait only where the time is known; the run of a W must not be put off for an unknown arrival
                if at >= NEVER or 100 * wait > patience * duration[s, 2]:
                    at = free[s]
                    kind = 2
            when[s] = at
            what[s] = kind
        s = 0
        for k in range(1, stages):
            if when[k] < when[s]:
                s = k
        if when[s] >= NEVER:
            return NEVER
        kind = what[s]
        n = count[s, kind]
        words[s, length[s]] = kind
        length[s] += 1
        count[s, kind] += 1
        left -= 1
        done = when[s] + duration[s, kind]
        free[s] = done
        makespan = max(makespan, done)
        touched[s] = True
        if kind == 0:
            if s == stages - 1:
                ready[1, s, n] = done
            else:
                ready[0, s + 1, n] = done + latency[0, s + 1]
                touched[s + 1] = True
        elif kind == 1 and s > 0:
            ready[1, s - 1, n] = done + latency[1, s - 1]
            touched[s - 1] = True
    return makespan
