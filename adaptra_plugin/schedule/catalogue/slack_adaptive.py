"""Slack-adaptive schedules: warm-ups follow the delays of the links (sec. 4.2 and 4.3), then local search."""

from __future__ import annotations

from collections.abc import Sequence

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.analysis import least_memory
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.catalogue.zb_h2 import zb_h2
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.search import search
from adaptra_plugin.schedule.tables import Tables


def slack_adaptive(tables: Tables, seed: int = 0, known: Sequence[Schedule] = ()) -> Schedule:
    """The schedule for the stage times, delays and activation limits of the tables; any number of stages a rank.

    ``known`` schedules (for instance the running one) are starting points of the search.
    Raises PlanError where a rank cannot hold one activation of each of its stages.
    """
    least = least_memory(tables)
    short = [
        f"rank {r} allows {int(tables.cap[r])} activations and needs {int(least[r])}, one for each of its stages"
        for r in range(len(least))
        if tables.cap[r] < least[r]
    ]
    if short:
        raise PlanError("limits cannot be kept: " + "; ".join(short))
    known = [*known, *(_stock(tables) if len(least) == len(tables.stage_rank) else [])]
    rows = [s.rows for s in known if s.split_only and s.stage_rank == tuple(tables.stage_rank.tolist())]
    return Schedule.from_rows(search(tables, seed, rows).rows, tables.microbatches)


def _stock(tables: Tables) -> list[Schedule]:
    """Zero-bubble schedules: nothing needs less memory for the same makespan when stages are even and links fast."""
    stages, n = len(tables.stage_rank), tables.microbatches
    return [zb_h1(stages, n), zb_h2(stages, n)]
