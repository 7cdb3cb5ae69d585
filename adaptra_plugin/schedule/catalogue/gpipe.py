"""GPipe (Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019)."""

from __future__ import annotations

from adaptra_plugin.schedule.schedule import B, F, Schedule


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all fused backwards (in order of microbatches, as every schedule here).

    Equal stages: makespan ``(microbatches + stages - 1)(F + B)``, peak ``microbatches`` activations on every stage.
    """
    return Schedule.from_words([[F] * microbatches + [B] * microbatches for _ in range(stages)])
