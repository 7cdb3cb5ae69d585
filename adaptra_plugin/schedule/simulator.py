"""Replays a schedule on a profile: when every action runs, why ranks are idle, and what the makespan hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action
from adaptra_plugin.schedule.compiled import no_collection
from adaptra_plugin.schedule.names import DUPLEX_MODES, LINK_MODELS
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.replay import replay
from adaptra_plugin.schedule.schedule import F, Schedule, W
from adaptra_plugin.schedule.tables import NS, Ints, Tables, per_microbatch, tabulate
from adaptra_plugin.schedule.timeline import Span, Timeline, Transfer


def simulate(
    schedule: Schedule,
    profile: Profile,
    link_model: str = "delegated",
    *,
    duplex: str | None = None,
    durations: Mapping[Action, float] | None = None,
) -> Timeline:
    """Event-driven replay; every stage runs its list in order and waits for inputs that have not arrived.

    *delegated*: a transfer arrives ``transfer_ms + latency_ms`` after it got the link, and holds the link for
    ``transfer_ms`` only. *blocking*: it holds the link for all of that, as send and recv kernels of one NCCL queue do
    (docs/design/method.md: two models of a link). ``duplex`` says whether the two directions of a
    link share one queue (``half``) or not (``full``); by default ``half`` for a blocking link under a split backward,
    whose sends and recvs are not paired, else ``full``. ``durations`` replaces the milliseconds of single actions.

    Raises PlanError for unknown models and for schedules that do not fit the profile.
    """
    if link_model not in LINK_MODELS:
        raise PlanError(f"unknown link model {link_model!r}: expected one of {', '.join(LINK_MODELS)}")
    if duplex is None:
        duplex = "half" if link_model == "blocking" and schedule.split_backward else "full"
    if duplex not in DUPLEX_MODES:
        raise PlanError(f"unknown duplex mode {duplex!r}: expected {' or '.join(DUPLEX_MODES)}")
    if schedule.microbatches != profile.microbatches:
        raise PlanError(f"the schedule has {schedule.microbatches} microbatches, the profile {profile.microbatches}")
    tables = tabulate(profile, schedule.stage_rank)
    result = run(schedule, tables, per_microbatch(tables, durations), link_model, duplex)
    return Simulated(schedule, tables.stage_rank, result)


def run(
    schedule: Schedule, tables: Tables, duration: Ints, link_model: str, duplex: str
) -> tuple[Ints, Ints, Ints, Ints]:
    """The kernel's ``start, end, moved, cause`` in nanoseconds, one row an action in the order of Schedule.table."""
    offsets, actions = schedule.table
    ranks = schedule.length
    latency, transfer, queue = tables.latency, tables.transfer, tables.link
    if link_model == "blocking":
        latency, transfer = np.zeros_like(latency), latency + transfer
    if duplex == "half":
        low, high = np.minimum(queue // ranks, queue % ranks), np.maximum(queue // ranks, queue % ranks)
        queue = np.where(queue < 0, queue, low * ranks + high)
    count = len(actions)
    start, end = np.zeros(count, np.int64), np.zeros(count, np.int64)
    moved, cause = np.zeros((count, 2), np.int64), np.zeros((count, 2), np.int64)
    done = replay(
        offsets,
        actions,
        tables.stage_rank,
        duration,
        latency,
        transfer,
        queue,
        ranks * ranks,
        start,
        end,
        moved,
        cause,
    )
    assert done == count, "a validated schedule cannot deadlock"
    return start, end, moved, cause


class Simulated(Timeline):
    """What a replay yields: spans, transfers and critical path are made from the kernel's tables when asked for."""

    _schedule: Schedule
    _stage_rank: Ints
    _result: tuple[Ints, Ints, Ints, Ints]

    def __init__(self, schedule: Schedule, stage_rank: Ints, result: tuple[Ints, Ints, Ints, Ints]) -> None:
        self.__dict__.update(
            ranks=schedule.length,
            makespan_ms=float(result[1].max()) / NS,
            peak_activations=schedule.peak_activations,
            _schedule=schedule,
            _stage_rank=stage_rank,
            _result=result,
        )

    @cached_property
    def _owner(self) -> Ints:
        return np.repeat(np.arange(self.ranks), np.diff(self._schedule.table[0]))

    @cached_property
    def _actions(self) -> list[Action]:
        return [action for actions in self._schedule.ranks for action in actions]

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """One span an action, by rank and time."""
        start, end, _, _ = self._result
        with no_collection():
            return tuple(map(Span, self._owner.tolist(), self._actions, (start / NS).tolist(), (end / NS).tolist()))

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """One transfer for each output that another rank consumes."""
        actions, flat, stages = self._schedule.table[1], self._actions, self._schedule.stages
        _, end, moved, _ = self._result
        # F goes to the stage after, I and B to the one before, W nowhere
        target = actions[:, 0] + np.where(actions[:, 1] == F, 1, -1)
        leaves = (actions[:, 1] != W) & (target >= 0) & (target < stages)
        to = self._stage_rank[np.where(leaves, target, 0)]
        sent = np.flatnonzero(leaves & (to != self._owner))
        times = [(t / NS).tolist() for t in (end[sent], moved[sent, 0], moved[sent, 1])]
        ends = (self._owner[sent].tolist(), to[sent].tolist())
        with no_collection():
            return tuple(map(Transfer, *ends, [flat[n] for n in sent.tolist()], *times))

    @cached_property
    def critical_path(self) -> tuple[Action, ...]:
        """Actions that the makespan hangs on, first to last."""
        return tuple(self._actions[n] for n in critical_path(self._schedule.table[0], *self._result))


def critical_path(offsets: Ints, start: Ints, end: Ints, moved: Ints, cause: Ints) -> list[int]:
    """Rows of the actions that the makespan hangs on, first to last.

    Each begins when the one before it ends, or when the one before it has been transferred (possibly after waiting
    for an earlier transfer on the same link).
    """
    firsts = set(offsets[:-1].tolist())
    n = int(np.argmax(end))
    path = [n]
    while start[n] > 0:
        source = int(cause[n, 0])
        if source >= 0 and moved[source, 1] == start[n]:
            while cause[source, 1] >= 0:  # the link was held by an earlier transfer
                source = int(cause[source, 1])
            n = source
        elif n not in firsts:
            n -= 1
        else:
            break
        path.append(n)
    return path[::-1]
