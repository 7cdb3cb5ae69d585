"""What the exact solver returns is a schedule that can be run, within the limits, and as short as it says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.planner import makespan_ns, plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.refine import Refinement
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.tables import tabulate

pytest.importorskip("ortools")

from adaptra_plugin.schedule.exact import Model


def random_profile(seed: int) -> Profile:
    """Small, with many durations of zero: actions that share an instant."""
    draw = random.Random(seed)
    ranks, virtual = draw.choice([(2, 1), (3, 1), (2, 2)])
    cap = [draw.choice([1, 2, 3, None]) for _ in range(ranks)]
    stages = tuple(
        StageProfile(*(draw.choice([0, 0, 1, 2]) for _ in range(3)), max_activations=cap[s % ranks])
        for s in range(ranks * virtual)
    )
    links = tuple(LinkProfile(r, (r + 1) % ranks, draw.choice([0, 3, 9])) for r in range(ranks - (virtual == 1)))
    if ranks == 2 and virtual == 2:
        links = (LinkProfile(0, 1, draw.choice([0, 3, 9])),)
    return Profile(draw.choice([2, 3, 4]), stages, links, virtual)


@pytest.mark.parametrize("seeds", [range(0, 60), range(60, 120)], ids=["first", "second"])
def test_solutions_run_within_the_limits_and_are_as_short_as_proven(seeds: range) -> None:
    for seed in seeds:
        profile = random_profile(seed)
        tables = tabulate(profile)
        known = makespan_ns(plan(profile).schedule, tables)
        solution = Model(tables, known).solve(20.0, seed=0, workers=1)
        assert solution.optimal and solution.rows is not None, seed
        schedule = Schedule.from_text(Schedule.from_rows(solution.rows, tables.microbatches).to_text())  # validates
        assert makespan_ns(schedule, tables) == solution.bound, seed
        if profile.virtual_stages == 1:
            held = zip(schedule.peak_activations, tables.cap.tolist(), strict=True)
            assert all(peak <= cap for peak, cap in held), seed


HARD = Profile(32, tuple(StageProfile(9.7 + s % 3, 11.3 - s % 2, 5.9 + s % 4, 4 + s % 5) for s in range(8)), ())


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1.0, 1e10])
def test_times_that_are_no_time_limit_are_refused(seconds: float) -> None:
    with pytest.raises(PlanError, match="expected a time above zero and at most"):
        Refinement(HARD, plan(HARD), seconds=seconds)


PARENT = """
import os, sys, time
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.refine import Refinement
from tests.schedule.test_exact import HARD
refinement = Refinement(HARD, plan(HARD), seconds=600)
child = os.fork()  # inherits the worker's pipe, as a data loader's workers do
if child == 0:
    time.sleep(60)
    os._exit(0)
print(refinement._process.pid, child, flush=True)
time.sleep(60)
"""


def test_the_worker_ends_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker, child = map(int, parent.stdout.readline().split())
    try:
        parent.kill()
        parent.wait()
        until = time.monotonic() + 30
        while alive(worker) and time.monotonic() < until:
            time.sleep(0.1)
        assert not alive(worker)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
