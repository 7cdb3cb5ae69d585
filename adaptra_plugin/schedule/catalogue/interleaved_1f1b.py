"""Interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", SC 2021, sec. 2.2)."""

from __future__ import annotations

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action, intern
from adaptra_plugin.schedule.schedule import B, F, Schedule


def interleaved_1f1b(ranks: int, virtual_stages: int, microbatches: int) -> Schedule:
    """Rank r holds stages ``r, r + ranks, ...`` and takes microbatches in rounds of ``ranks``, chunk by chunk; it
    starts with ``2 (ranks - r - 1) + (virtual_stages - 1) ranks`` forwards, then one forward and one fused backward
    in turns.

    Equal stages: makespan ``(virtual_stages microbatches + ranks - 1)(F + B)`` with the times of one stage, peak
    one more than the starting forwards. Raises PlanError unless microbatches are a multiple of ranks.
    """
    if microbatches % ranks:
        raise PlanError(
            f"interleaved-1f1b takes microbatches in rounds of as many as ranks: {microbatches} is not a multiple of "
            f"{ranks}; use slack-adaptive-interleaved or change the number of microbatches"
        )
    total = microbatches * virtual_stages

    def nth(rank: int, n: int, code: int) -> Action:
        round_, rest = divmod(n, ranks * virtual_stages)
        chunk = rest // ranks if code == F else virtual_stages - 1 - rest // ranks
        return intern(chunk * ranks + rank, code, round_ * ranks + rest % ranks)

    lists = []
    for rank in range(ranks):
        warm = min(total, 2 * (ranks - rank - 1) + (virtual_stages - 1) * ranks)
        actions = [nth(rank, n, F) for n in range(warm)]
        for n in range(total - warm):
            actions += [nth(rank, warm + n, F), nth(rank, n, B)]
        actions += [nth(rank, n, B) for n in range(total - warm, total)]
        lists.append(tuple(actions))
    return Schedule(tuple(lists))
