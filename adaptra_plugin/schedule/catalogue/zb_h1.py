"""ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, sec. 2.1): no more memory than 1F1B."""

from __future__ import annotations

from adaptra_plugin.schedule.schedule import F, I, Schedule, W


def deferred(warmups: list[int], postponed: list[int], microbatches: int) -> Schedule:
    """Stage i starts with ``warmups[i]`` forwards; then I and F in turns, W ``postponed[i]`` microbatches behind I."""
    words = []
    for warm, behind in zip(warmups, postponed, strict=True):
        word = [F] * min(warm, microbatches)
        for n in range(microbatches):
            word.append(I)
            if n >= behind:
                word.append(W)
            if warm + n < microbatches:
                word.append(F)
        word += [W] * min(behind, microbatches)
        words.append(word)
    return Schedule.from_words(words)


def zb_h1(stages: int, microbatches: int) -> Schedule:
    """1F1B's warm-ups; stage i postpones i weight gradients, so that every stage holds at most ``stages`` activations.

    Equal stages with F = I = W: makespan ``microbatches (F + I + W) + (stages - 1)(F + I - W)``.
    """
    return deferred([stages - i for i in range(stages)], list(range(stages)), microbatches)
