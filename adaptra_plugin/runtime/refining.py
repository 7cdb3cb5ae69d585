"""The exact solver beside the running plan: at most one refinement at a time, and whatever becomes of it, the plan stays."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import PlanError
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.refine import Refinement

logger = logging.getLogger("adaptra")
Refiner = Callable[[Profile, Plan], Refinement]

GAP = 0.005
"""A plan further than this from its lower bound is given to the exact solver, and replaced by one better by as much."""
PART = "exact solver"
INSTEAD = "plans run as they are first made, without being improved"


def exact_refiner(config: AdaptraConfig) -> Refiner | None:
    """Starts CP-SAT in a worker process; None if it is off or not installed."""
    try:
        installed = importlib.util.find_spec("ortools") is not None
    except (ImportError, ValueError):
        installed = False  # something of that name which is no package
    if config.refine_s <= 0 or not installed:
        return None
    return lambda profile, found: Refinement(profile, found, seconds=config.refine_s, workers=1)


class Refining:
    """Args: `refiner` starts the improvement of a plan, None: there is none; `parts` hear of what fails."""

    def __init__(self, refiner: Refiner | None, parts: Parts) -> None:
        self._refiner = refiner
        self._parts = parts
        self._running: tuple[Refinement, Profile, Plan] | None = None

    def begin(self, profile: Profile, found: Plan) -> None:
        """Starts on a plan, if that leaves something to find."""
        self.end()
        if self._refiner is None or found.gap <= GAP or found.optimal:
            return
        try:
            self._running = (self._refiner(profile, found), profile, found)
        except Exception as error:  # noqa: BLE001  whatever it is
            self._failed(error)

    def take(self) -> tuple[Profile, Plan, Plan] | None:
        """(profile, running plan, better plan) once a refinement has ended and was worth it."""
        if self._running is None or not self._running[0].done:
            return None
        (refinement, profile, running), self._running = self._running, None
        try:
            refinement.result()
        except Exception as error:  # noqa: BLE001  whatever it is
            self._failed(error)
        else:
            self._parts.works(PART, enough=1)
        best = refinement.best  # what it had found before it failed counts too
        return (profile, running, best) if best.makespan_ms < running.makespan_ms * (1 - GAP) else None

    def end(self) -> None:
        """Ends the refinement that runs, if one does."""
        if self._running is None:
            return
        (refinement, _, _), self._running = self._running, None
        try:
            refinement.cancel()
        except Exception as error:  # noqa: BLE001  whatever it is
            logger.debug("the exact solver's worker could not be ended: %s", error)

    def _failed(self, error: Exception) -> None:
        self._parts.lost(PART, INSTEAD, str(error) if isinstance(error, PlanError) else error)
