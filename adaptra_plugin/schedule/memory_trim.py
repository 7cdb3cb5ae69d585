"""Gives memory back: weight gradients are pulled forward and forwards put off, as long as it costs no time."""

from __future__ import annotations

import numpy as np

from adaptra_plugin.schedule.compiled import compiled
from adaptra_plugin.schedule.graph import heads
from adaptra_plugin.schedule.tables import Ints


@compiled
def peaks(rows: Ints, microbatches: int) -> Ints:
    """The most activations that each rank holds at once."""
    ranks, length = rows.shape
    peak = np.zeros(ranks, np.int64)
    for r in range(ranks):
        held = 0
        for k in range(length):
            kind = rows[r, k] // microbatches % 3
            held += 1 if kind == 0 else (-1 if kind == 2 else 0)
            peak[r] = max(peak[r], held)
    return peak


@compiled
def within(rows: Ints, r: int, limit: int, microbatches: int, place: Ints, out: Ints) -> bool:
    """Writes rank ``r``'s list into ``out`` with at most ``limit`` activations; False where that cannot be.

    Where an F would exceed the limit, the next W of the list comes first, and its I before it. ``place [n]`` is
    scratch space.
    """
    length = rows.shape[1]
    for k in range(length):
        place[rows[r, k]] = k
    done = np.zeros(length, np.bool_)
    held = size = next_w = 0
    for k in range(length):
        if done[k]:
            continue
        n = rows[r, k]
        kind = n // microbatches % 3
        while kind == 0 and held >= limit:
            while next_w < length and (done[next_w] or rows[r, next_w] // microbatches % 3 != 2):
                next_w += 1
            if next_w == length:
                return False
            w = rows[r, next_w]
            if not done[place[w - 2 * microbatches]]:
                return False  # its F is still to come: the limit is below what the order needs
            if not done[place[w - microbatches]]:
                done[place[w - microbatches]] = True
                out[size] = w - microbatches
                size += 1
            done[next_w] = True
            out[size] = w
            size += 1
            held -= 1
        done[k] = True
        out[size] = n
        size += 1
        held += 1 if kind == 0 else (-1 if kind == 2 else 0)
    return True


@compiled
def trim_memory(
    rows: Ints,
    rank_of: Ints,
    cost: Ints,
    before: Ints,
    after: Ints,
    lag: Ints,
    stressed: Ints,
    microbatches: int,
    goal: int,
    stressed_goal: int,
    tries: int,
) -> None:
    """Lowers the peaks of ``rows`` in place, rank by rank, first by much, then by less, in at most ``tries`` replays.

    A change stays when the makespan is at most ``goal``, and at most ``stressed_goal`` with the lags ``stressed [n]``.
    """
    ranks, length = rows.shape
    head, order = np.empty(len(cost), np.int64), np.empty(len(cost), np.int64)
    place = np.empty(len(cost), np.int64)
    old, new = np.empty(length, np.int64), np.empty(length, np.int64)
    peak = peaks(rows, microbatches)
    most = 0
    for r in range(ranks):
        most = max(most, peak[r])
    step = 1
    while 2 * step < most:
        step *= 2
    while step > 0 and tries > 0:
        for r in range(ranks):
            while peak[r] > step and tries > 0:
                if not within(rows, r, peak[r] - step, microbatches, place, new):
                    break
                for k in range(length):
                    old[k], rows[r, k] = rows[r, k], new[k]
                tries -= 1
                value = heads(rows, rank_of, cost, before, after, lag, head, order)
                good = 0 <= value <= goal
                if good:
                    tries -= 1
                    good = heads(rows, rank_of, cost, before, after, stressed, head, order) <= stressed_goal
                if not good:
                    for k in range(length):
                        rows[r, k] = old[k]
                    break
                peak[r] -= step
        step //= 2


@compiled
def trim_warmups(
    rows: Ints,
    rank_of: Ints,
    cost: Ints,
    before: Ints,
    after: Ints,
    lag: Ints,
    stressed: Ints,
    microbatches: int,
    goal: int,
    stressed_goal: int,
    tries: int,
) -> None:
    """Moves the first I of every rank ahead of forwards that need not come before it, under the rules of ``trim_memory``.

    From the last rank backwards, because a rank's first gradient comes from the one after it.
    """
    ranks, length = rows.shape
    head, order = np.empty(len(cost), np.int64), np.empty(len(cost), np.int64)
    for r in range(ranks - 1, -1, -1):
        first = 0
        while first < length and rows[r, first] // microbatches % 3 == 0:
            first += 1
        if first == length:
            continue
        step = 1
        while 2 * step < first:
            step *= 2
        while step > 0 and tries > 0:
            # its own F stays before it; a gradient that comes from this rank cannot be moved past what it needs
            if first - step < 1 or rows[r, first] - microbatches == rows[r, first - step]:
                step //= 2
                continue
            n = rows[r, first]
            for k in range(first, first - step, -1):
                rows[r, k] = rows[r, k - 1]
            rows[r, first - step] = n
            tries -= 2
            value = heads(rows, rank_of, cost, before, after, lag, head, order)
            good = 0 <= value <= goal
            if good:
                good = heads(rows, rank_of, cost, before, after, stressed, head, order) <= stressed_goal
            if good:
                first -= step
            else:
                for k in range(first - step, first):
                    rows[r, k] = rows[r, k + 1]
                rows[r, first] = n
                step //= 2
