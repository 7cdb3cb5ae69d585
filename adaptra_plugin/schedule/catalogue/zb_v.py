"""ZB-V (Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024; "Zero Bubble Pipeline Parallelism",
ICLR 2024, sec. 6): two stages a rank, placed in the shape of a V, no bubbles with 1F1B's memory."""

from __future__ import annotations

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action, intern
from adaptra_plugin.schedule.schedule import F, I, Schedule, W


def v_placement(ranks: int) -> list[int]:
    """The rank of every stage: down 0, 1, ... and back up, so that rank 0 holds the first and the last stage."""
    return [*range(ranks), *reversed(range(ranks))]


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Handcrafted for F = I = W: a rank fills the pipeline, turns F, I, W of both its stages over in the steady state,
    and keeps its last weight gradients for the drain.

    Equal stages with F = I = W: every rank is busy without a break once it has started; peak ``2 ranks``
    activations of one stage, the memory of 1F1B. Raises PlanError below ``2 ranks`` microbatches, where the
    pattern does not fill the pipeline.
    """
    if microbatches < 2 * ranks:
        raise PlanError(f"zb-v needs at least {2 * ranks} microbatches on {ranks} ranks, not {microbatches}")
    return Schedule(tuple(_rank(rank, ranks, microbatches) for rank in range(ranks)))


def _rank(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    place = (rank, 2 * ranks - 1 - rank)  # the way down, the way up
    count = [[0, 0, 0], [0, 0, 0]]
    actions: list[Action] = []

    def take(way: int, *codes: int) -> None:
        for code in codes:
            number = count[way][code]
            if number < (microbatches if code == F else count[way][code - 1]):
                actions.append(intern(place[way], code, number))
                count[way][code] += 1

    take(0, *[F] * (2 * (ranks - rank) - 1))
    for _ in range(rank):
        take(1, F)
        take(0, F)
    for _ in range(ranks - rank):
        take(1, F, I, W)
    while count[1][F] < microbatches:
        take(0, F, I, W)
        take(1, F, I, W)
    for _ in range(rank):
        take(0, I)
        take(1, I)
    for _ in range(ranks - rank):
        take(0, I, W)
    for way in (1, 0):
        take(way, *[W] * (count[way][I] - count[way][W]))
    return tuple(actions)
