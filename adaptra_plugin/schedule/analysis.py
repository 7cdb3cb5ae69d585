"""The paper's analysis (sec. 4.1 and 4.2): slackness, what delay it tolerates, and the warm-ups that follow from it.

Warm-up ``x_i``: forwards of stage i before its first backward. Slackness ``D_i = x_i - x_{i+1}``. One stage a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.tables import Ints, Tables, tabulate


def slackness(warmup: Sequence[int]) -> tuple[int, ...]:
    """``D_i`` of neighbouring stages, ``[stages - 1]``. Raises PlanError where a warm-up increases along the
    pipeline, which cannot be (Lemma 1: a stage cannot start more forwards than the one before has finished)."""
    slack = tuple(a - b for a, b in pairwise(warmup))
    for stage, value in enumerate(slack):
        if value < 0:
            raise PlanError(
                f"warm-up {warmup[stage + 1]} of stage {stage + 1} exceeds {warmup[stage]} of stage {stage}: "
                "warm-ups never increase along the pipeline"
            )
    return slack


def tolerated_ms(profile: Profile, warmup: Sequence[int]) -> tuple[float, ...]:
    """The one-way delay that each link may have without a cascade, ``[stages - 1]`` (Eq. 1): from
    ``F_i + I_i + 2 c_i <= D_i (F_{i+1} + I_{i+1})``. Negative: even an instant link cascades."""
    busy = [stage.forward_ms + stage.backward_input_ms for stage in profile.stages]
    return tuple((d * busy[i + 1] - busy[i]) / 2 for i, d in enumerate(slackness(warmup)))


def cascades(profile: Profile, warmup: Sequence[int]) -> tuple[int, ...]:
    """Links (by their first stage) whose delay, the mean of both directions, is above what Eq. 1 tolerates."""
    limits = tolerated_ms(profile, warmup)
    delay = [(profile.link(i, i + 1).latency_ms + profile.link(i + 1, i).latency_ms) / 2 for i in range(len(limits))]
    return tuple(i for i, limit in enumerate(limits) if delay[i] > max(limit, 0.0) and delay[i] > 0)


def delay_cost_ms(delay_ms: float, slack: int, op_ms: float, microbatches: int) -> float:
    """Theorem 1, equal operation times: what a delay of one link adds to the iteration, up to a constant factor.

    ``c`` where ``c <= (D - 1) t``; ``N c / (D + 1)`` above. Raises PlanError for a negative slackness.
    """
    if slack < 0:
        raise PlanError(f"slackness {slack} is negative")
    return delay_ms if delay_ms <= (slack - 1) * op_ms else microbatches * delay_ms / (slack + 1)


def initial_warmup(stages: int, microbatches: int, activations: int) -> tuple[int, ...]:
    """Alg. 1, no straggler known: stage 0 starts with what fits, ``activations = floor(M / M_F)``; the slack is
    spread as evenly as possible, larger ones first, which maximises the smallest slackness.

    Raises PlanError where not even one forward a stage in flight fits.
    """
    top = min(activations, microbatches)
    if top < 1:
        raise PlanError(f"{activations} activations fit on stage 0: at least one is needed")
    share, larger = divmod(top - 1, max(1, stages - 1))
    warm = [top]
    for stage in range(stages - 1):
        warm.append(warm[-1] - share - (1 if stage < larger else 0))
    return tuple(warm)


def adapted_warmup(profile: Profile) -> tuple[int, ...]:
    """Alg. 2 as printed: from the last stage backwards ``x_{S-1} = 1`` and
    ``D_i = min(N - 2S, max(1, ceil((F_i + I_i + 2 c_i) / (F_{i+1} + I_{i+1}))))``, memory relaxed.

    Warm-ups are limited to the microbatches, and a slackness to at least one where ``N - 2S`` is smaller.
    """
    stages, n = len(profile.stages), profile.microbatches
    slack = adapted_slack(tabulate(profile), 100)
    warm = [1]
    for stage in range(stages - 2, -1, -1):
        warm.append(warm[-1] + max(1, min(n - 2 * stages, int(slack[stage]))))
    return tuple(min(x, n) for x in reversed(warm))


def adapted_slack(tables: Tables, percent: int) -> Ints:
    """Alg. 2's slackness ``max(1, ceil((F_i + I_i + c + c') / (F_{i+1} + I_{i+1})))`` with ``percent`` of both delays.

    Below 100 percent the own times shrink too, down to a slackness of one everywhere, which is 1F1B's.
    """
    busy = tables.duration[:, 0] + tables.duration[:, 1]
    way = tables.latency + tables.transfer
    slack = np.ones(max(0, len(busy) - 1), np.int64)
    for i in range(len(slack)):
        need = int(busy[i]) * min(percent, 100) + int(way[0, i + 1] + way[1, i]) * percent
        slack[i] = max(1, math.ceil(need / (100 * max(1, int(busy[i + 1])))))
    return slack


def describe(profile: Profile, warmup: Sequence[int]) -> list[str]:
    """One line a link: slackness, tolerated delay and actual delay, for reports."""
    lines = []
    for i, limit in enumerate(tolerated_ms(profile, warmup)):
        out, back = profile.link(i, i + 1).latency_ms, profile.link(i + 1, i).latency_ms
        verdict = "cascades" if i in cascades(profile, warmup) else "absorbed"
        lines.append(
            f"link {i}-{i + 1}: slackness {warmup[i] - warmup[i + 1]}, tolerates {max(limit, 0.0):.1f} ms, "
            f"delay {out:.1f}/{back:.1f} ms: {verdict}"
        )
    return lines


def least_memory(tables: Tables) -> Ints:
    """Activations that each rank needs at least: one for each of its stages."""
    return np.bincount(tables.stage_rank, minlength=len(tables.cap)).astype(np.int64)
