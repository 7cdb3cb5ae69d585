"""Host offload of the activations that exceed a limit, when moving them costs less than keeping to the limit.

Alg. 2 takes memory as relaxed because surplus activations may be offloaded. Here that is a choice with a price: on a stage
that exceeds its limit every F (copy out) and every I (copy in) takes ``offload_ms`` longer. That overstates the price
where only some microbatches are moved, so that a plan with offload is only taken where it is certain to pay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.profile import Profile, StageProfile


def without_limits(profile: Profile, offload_ms: float, stages: set[int]) -> Profile:
    """The profile without the limits of ``stages``, which pay for it. Raises PlanError for a negative price."""
    if not (np.isfinite(offload_ms) and offload_ms >= 0):
        raise PlanError(f"offload_ms is {offload_ms}: expected a finite time of at least 0 ms")
    return replace(
        profile, stages=tuple(_paying(s, offload_ms) if n in stages else s for n, s in enumerate(profile.stages))
    )


def _paying(stage: StageProfile, offload_ms: float) -> StageProfile:
    return StageProfile(
        stage.forward_ms + offload_ms, stage.backward_input_ms + offload_ms, stage.backward_weight_ms, None
    )


def surplus(profile: Profile, peaks: tuple[int, ...]) -> tuple[int, ...]:
    """Per rank, activations at the peak beyond its limit: what the host has to hold."""
    out = []
    for rank, peak in enumerate(peaks):
        limits = [s.max_activations for s in profile.stages[rank :: profile.ranks]]
        out.append(0 if None in limits else max(0, peak - sum(limit for limit in limits if limit is not None)))
    return tuple(out)
