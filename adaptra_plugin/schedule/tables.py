"""A profile as the integer tables that the kernels work on. Times are whole nanoseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import CODE, Action
from adaptra_plugin.schedule.profile import Profile

Ints = NDArray[np.int64]
NS = 1_000_000
"""Nanoseconds in a millisecond."""
UNLIMITED = np.int64(1) << 40


def nanoseconds(ms: float) -> int:
    """Whole nanoseconds of a time in milliseconds."""
    return round(ms * NS)


@dataclass(frozen=True)
class Tables:
    """``duration[stage, kind code]``, and per stage what reaching it costs.

    ``latency[d, stage]`` and ``transfer[d, stage]`` are those of the link into the stage; d = 0: the activation, from
    the stage before; d = 1: the gradient, from the stage after. ``link[d, stage]`` numbers the directed link of ranks
    (-1: both stages on one rank). ``cap[rank]`` is the rank's activation limit.
    """

    microbatches: int
    stage_rank: Ints
    duration: Ints
    latency: Ints
    transfer: Ints
    link: Ints
    cap: Ints

    def with_links(self, latency: Ints, transfer: Ints) -> Tables:
        """A copy with other link costs."""
        return replace(self, latency=latency, transfer=transfer)


def tabulate(profile: Profile, stage_rank: Sequence[int] | None = None) -> Tables:
    """Tables of a profile; ``stage_rank`` places the stages (default: stage s on rank s modulo ranks).

    Raises PlanError when the placement does not fit the profile, and when only some stages of a rank have a limit: the
    limits of a rank's stages add up, and a limit plus none would be none, so that what was asked for would be lost.
    """
    stages, ranks = len(profile.stages), profile.ranks
    places = np.array([s % ranks for s in range(stages)] if stage_rank is None else stage_rank, np.int64)
    if len(places) != stages or len(set(places.tolist())) != ranks or not 0 <= places.min() <= places.max() < ranks:
        raise PlanError(
            f"the schedule has {len(places)} stages on {len(set(places.tolist()))} ranks, "
            f"the profile {stages} stages on {ranks} ranks"
        )
    _check_limits(profile, places)
    duration = np.zeros((stages, 4), np.int64)
    latency, transfer = np.zeros((2, stages), np.int64), np.zeros((2, stages), np.int64)
    link = np.full((2, stages), -1, np.int64)
    cap = np.zeros(ranks, np.int64)
    for s, stage in enumerate(profile.stages):
        parts = [nanoseconds(t) for t in (stage.forward_ms, stage.backward_input_ms, stage.backward_weight_ms)]
        duration[s] = [*parts, parts[1] + parts[2]]
        cap[places[s]] += UNLIMITED if stage.max_activations is None else min(stage.max_activations, UNLIMITED)
        for way, source in ((0, s - 1), (1, s + 1)):
            if 0 <= source < stages and places[source] != places[s]:
                cost = profile.link(int(places[source]), int(places[s]))
                latency[way, s], transfer[way, s] = nanoseconds(cost.latency_ms), nanoseconds(cost.transfer_ms)
                link[way, s] = places[source] * ranks + places[s]
    return Tables(profile.microbatches, places, duration, latency, transfer, link, np.minimum(cap, UNLIMITED))


def _check_limits(profile: Profile, places: Ints) -> None:
    limits = [stage.max_activations for stage in profile.stages]
    for rank in range(profile.ranks):
        mine = np.flatnonzero(places == rank).tolist()
        without = [s for s in mine if limits[s] is None]
        if without and len(without) < len(mine):
            limited = ", ".join(f"stage {s} allows {limits[s]}" for s in mine if limits[s] is not None)
            raise PlanError(
                f"rank {rank} mixes stages with and without max_activations: {limited}, "
                f"stage {', '.join(map(str, without))} has no limit; the limits of a rank's stages add up, "
                "so give all of them one or none"
            )


def per_microbatch(tables: Tables, durations: Mapping[Action, float] | None) -> Ints:
    """``[stage, kind code, microbatch]`` nanoseconds; ``durations`` replaces single actions' milliseconds.

    Raises PlanError for actions that the profile does not have.
    """
    full = np.repeat(tables.duration[:, :, None], tables.microbatches, axis=2)
    for action, ms in (durations or {}).items():
        if not (action.stage < full.shape[0] and action.microbatch < full.shape[2]):
            raise PlanError(f"a duration is given for {action}, which the profile does not have")
        full[action.stage, CODE[action.kind], action.microbatch] = nanoseconds(ms)
    return full
