"""Paced compute: a stage really trains, then sleeps until its budget is spent.

For machines without enough cores or GPUs to run all stages at full speed at once. A figure measured this way is always reported as paced.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from adaptra_plugin.config import PacedCompute
from adaptra_plugin.schedule.actions import Kind


class ComputeThrottle:
    """Sleeps out the rest of the budget of an action. Without budgets it does nothing."""

    def __init__(self, budgets: PacedCompute | None) -> None:
        self._budget_ms: dict[Kind, float] = {}
        if budgets is not None:
            self._budget_ms = {
                Kind.FORWARD: budgets.forward_ms,
                Kind.BACKWARD_INPUT: budgets.backward_input_ms,
                Kind.BACKWARD_WEIGHT: budgets.backward_weight_ms,
                Kind.FULL_BACKWARD: budgets.backward_input_ms + budgets.backward_weight_ms,
            }

    @contextmanager
    def pace(self, kind: Kind) -> Iterator[None]:
        start = time.perf_counter()
        yield
        left = start + self._budget_ms.get(kind, 0.0) / 1e3 - time.perf_counter()
        if left > 0:
            time.sleep(left)
