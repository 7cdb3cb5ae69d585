"""ZB-H2 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, sec. 2.2): no bubbles, about twice 1F1B's memory."""

from __future__ import annotations

from adaptra_plugin.schedule.catalogue.zb_h1 import deferred
from adaptra_plugin.schedule.schedule import Schedule


def zb_h2(stages: int, microbatches: int) -> Schedule:
    """Stage i starts with ``2 (stages - i) - 1`` forwards and postpones 2i weight gradients.

    Equal stages with F = I = W and at least ``2 stages - 1`` microbatches: once started, a stage never waits, so it is
    busy for ``microbatches (F + I + W)`` in a row; makespan that plus ``(stages - 1) F``; at most
    ``2 stages - 1`` activations.
    """
    return deferred([2 * (stages - i) - 1 for i in range(stages)], [2 * i for i in range(stages)], microbatches)
