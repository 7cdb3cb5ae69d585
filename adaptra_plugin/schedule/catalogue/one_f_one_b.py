"""1F1B, or PipeDream-Flush (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021)."""

from __future__ import annotations

from adaptra_plugin.schedule.schedule import B, F, Schedule


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """Stage i starts with ``stages - i`` forwards, then one fused backward and one forward in turns.

    Equal stages: makespan ``(microbatches + stages - 1)(F + B)``, peak ``min(microbatches, stages - i)`` activations.
    """
    words = []
    for stage in range(stages):
        warm = min(microbatches, stages - stage)
        words.append([F] * warm + [B, F] * (microbatches - warm) + [B] * warm)
    return Schedule.from_words(words)
