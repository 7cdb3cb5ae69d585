"""Quality and speed of the planner.

    python -m benchmarks.planner [--profiles 200] [--exact-seconds 10] [--first 0] [--skip-exact]

Prints: how far the first plan is from the proven optimum and how often the refined plan is proven, on random profiles;
planning times; the simulator's speed; and ratios against the schedule generators of torch and of sail-sg, measured in the same
run, where they are installed. Times are medians of several repeats in a warm process, with their spread.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.compiled import HAVE_NUMBA
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.refine import refine
from adaptra_plugin.schedule.simulator import run, simulate
from adaptra_plugin.schedule.tables import per_microbatch, tabulate


def random_profile(seed: int) -> Profile:
    """3-8 uneven stages, 6-32 microbatches, 0-3 slow links; activation limits when the seed is odd."""
    rng = random.Random(seed)
    stages, microbatches, base = rng.randint(3, 8), rng.randint(6, 32), rng.uniform(5, 12)
    made = []
    for _ in range(stages):
        forward = base * rng.uniform(0.7, 1.3)
        limit = rng.randint(2, 2 * stages) if seed % 2 else None
        backward, weight = forward * rng.uniform(0.9, 1.3), forward * rng.uniform(0.4, 0.9)
        made.append(StageProfile(round(forward, 2), round(backward, 2), round(weight, 2), limit))
    slow = sorted(rng.sample(range(stages - 1), min(rng.randint(0, 3), stages - 1)))
    return Profile(microbatches, tuple(made), tuple(LinkProfile(a, a + 1, round(rng.uniform(5, 60), 2)) for a in slow))


def large(stages: int, microbatches: int, links: int = 1) -> Profile:
    """Slightly uneven stages with slow links, as in the published profiles."""
    rng = random.Random(stages * 1000 + microbatches)
    made = tuple(StageProfile(rng.choice([8, 9, 10]), rng.choice([10, 11]), rng.choice([5, 6])) for _ in range(stages))
    slow = tuple(LinkProfile(a, a + 1, 30.0) for a in rng.sample(range(stages - 1), links))
    return Profile(microbatches, made, slow)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and median absolute deviation of the run time, seconds, after one run to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    middle = statistics.median(times)
    return middle, statistics.median(abs(t - middle) for t in times)


def quality(first: int, count: int, seconds: float) -> None:
    """First plan against the proven optimum; share of refined plans proven within the time limit."""
    gaps, to_bound, unproven, took = [], [], [], []
    for seed in range(first, first + count):
        profile = random_profile(seed)
        quick = plan(profile)
        began = time.perf_counter()
        best = refine(profile, quick, seconds=seconds)
        took.append(time.perf_counter() - began)
        to_bound.append(quick.makespan_ms / best.lower_bound_ms - 1)
        if best.optimal and took[-1] <= seconds:
            gaps.append(quick.makespan_ms / best.makespan_ms - 1)
        else:
            unproven.append((seed, best.gap))  # or proven too late
    print(f"{count} random profiles, exact refinement for at most {seconds:g} s")
    print(
        f"  proven optimal: {len(gaps)} of {count} ({len(gaps) / count:.1%}); mean {statistics.mean(took):.1f} s, worst {max(took):.1f} s"
    )
    print(f"  first plan above the proven optimum: mean {statistics.mean(gaps):.2%}, worst {max(gaps):.2%}")
    print(f"  first plan above the best known bound, all profiles: mean {statistics.mean(to_bound):.2%}")
    for seed, gap in unproven:
        print(f"  not proven: seed {seed}, {gap:.2%} above its bound")


def speed() -> None:
    """Planning times and the simulator's actions a second."""
    for stages, microbatches, repeats in ((8, 32, 15), (16, 64, 7), (64, 512, 3)):
        profile = large(stages, microbatches)
        middle, spread = timed(lambda p=profile: plan(p), repeats)  # type: ignore[misc]
        print(f"first plan {stages:2d} x {microbatches:3d}: {middle * 1e3:8.1f} ms (+- {spread * 1e3:.1f})")
    tight = [random_profile(s) for s in range(1, 400, 2)]
    tight = [p for p in tight if len(p.stages) == 8 and p.microbatches >= 24][:8]
    plan(tight[0])
    times = []
    for profile in tight:
        began = time.perf_counter()
        plan(profile)
        times.append(time.perf_counter() - began)
    print(f"first plan, 8 stages with limits: median {np.median(times) * 1e3:.1f} ms, worst {max(times) * 1e3:.1f} ms")
    for stages, microbatches in ((8, 32), (64, 512)):
        profile = large(stages, microbatches)
        schedule = plan(profile, schedule="zb-h1").schedule
        tables = tabulate(profile)
        durations = per_microbatch(tables, None)
        actions = sum(map(len, schedule.ranks))
        kernel, _ = timed(lambda s=schedule, t=tables, d=durations: run(s, t, d, "delegated", "full"), 7)  # type: ignore[misc]
        whole, _ = timed(lambda s=schedule, p=profile: simulate(s, p).makespan_ms, 5)  # type: ignore[misc]
        spans, _ = timed(lambda s=schedule, p=profile: simulate(s, p).spans, 5)  # type: ignore[misc]
        print(
            f"simulator {stages} x {microbatches}: {actions / kernel / 1e6:.1f} million actions/s, "
            f"{actions / whole / 1e6:.1f} through simulate(), {actions / spans / 1e6:.2f} with a span object each"
        )


def against_torch() -> None:
    """Ratios against torch's generators of the same stock schedules."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no ratio")
        return
    import torch
    from torch.distributed.pipelining import schedules

    class Stage:
        """As much of a pipeline stage as the generators look at."""

        def __init__(self, index: int, ranks: int, total: int) -> None:
            self.stage_index, self.group_size, self.num_stages = index, ranks, total
            self.group_rank, self.group, self.device = index % ranks, None, torch.device("cpu")
            self.is_first, self.is_last, self.has_backward = index == 0, index == total - 1, False
            self.submod = torch.nn.Identity()
            self.stage_index_to_group_rank = {s: s % ranks for s in range(total)}

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    ranks, virtual, microbatches = 8, 2, 32
    even = Profile(microbatches, (StageProfile(1, 1, 1),) * (ranks * virtual), (), virtual)

    def theirs() -> None:
        stages = [Stage(0, ranks, ranks * virtual), Stage(ranks, ranks, ranks * virtual)]
        schedules.ScheduleInterleaved1F1B(stages, microbatches, loss_fn=None)

    ours, _ = timed(lambda: plan(even, schedule="interleaved-1f1b"), 7)
    other, _ = timed(theirs, 7)
    print(
        f"interleaved 1F1B, {ranks} x {virtual} x {microbatches}: torch {other * 1e3:.1f} ms (all ranks' lists), "
        f"ours {ours * 1e3:.1f} ms (lists, validation, bound and replay), ratio {other / ours:.2f}"
    )


def against_sail() -> None:
    """Ratio against sail-sg's generator of ZB-H1 (pip install --no-deps zbpp_light), loaded without its Megatron patches."""
    found = importlib.util.find_spec("zbpp_light")
    if found is None or found.origin is None:
        print("zbpp_light (sail-sg) is not installed: no ratio")
        return
    spec = importlib.util.spec_from_file_location("sail", Path(found.origin).with_name("auto_schedule.py"))
    assert spec is not None and spec.loader is not None
    sail = importlib.util.module_from_spec(spec)
    sys.modules["sail"] = sail  # its dataclasses look themselves up
    spec.loader.exec_module(sail)
    stages, microbatches = 64, 512
    ours, _ = timed(lambda: zb_h1(stages, microbatches), 5)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its schedules
        other, _ = timed(lambda: sail.auto_schedule(stages, microbatches), 5)
    print(
        f"ZB-H1, {stages} x {microbatches}: sail-sg {other * 1e3:.0f} ms, ours {ours * 1e3:.0f} ms (with validation), "
        f"ratio {other / ours:.2f}"
    )


def main() -> None:
    """Prints every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first random profile")
    parser.add_argument("--exact-seconds", type=float, default=10.0)
    parser.add_argument("--skip-exact", action="store_true", help="speed only")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, numba {'yes' if HAVE_NUMBA else 'no'}")
    speed()
    against_torch()
    against_sail()
    if not options.skip_exact:
        quality(options.first, options.profiles, options.exact_seconds)


if __name__ == "__main__":
    main()
