"""After `prepare` no plan waits for the compiler; processes of a host take turns, and none waits for ever."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time

import pytest

from adaptra_plugin.schedule import prepare as module
from adaptra_plugin.schedule.compiled import HAVE_NUMBA, KERNELS
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile

needs_numba = pytest.mark.skipif(not HAVE_NUMBA, reason="kernels are compiled with numba")


def compiled() -> dict[str, int]:
    return {kernel.py_func.__name__: len(kernel.signatures) for kernel in KERNELS}


@pytest.mark.slow
@needs_numba
def test_nothing_is_left_to_be_compiled():
    program = (
        "from tests.schedule.test_prepare import compiled, plans, prepare; prepare();"
        "before = compiled(); plans(); after = compiled(); print(before == after, sum(before.values()), after)"
    )
    # a process of its own: others may have compiled what this one should
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    same, kernels, after = done.stdout.split(maxsplit=2)
    assert same == "True" and int(kernels) >= 8, after


prepare = module.prepare


def plans() -> None:
    """Many kinds of profile: even and uneven, healthy and slow, with limits and without, one and two chunks."""
    random_ = random.Random(5)
    for number in range(60):
        ranks, chunks, cap = 1 + number % 5, 1 + number % 2, (None, 6)[number % 3 == 0]
        spread = (0.1, 5.0, 30.0)[number % 3]
        stages = tuple(
            StageProfile(
                6 + random_.random() * spread, 5 + random_.random() * spread, 4 + random_.random() * spread, cap
            )
            for _ in range(ranks * chunks)
        )
        links = tuple(LinkProfile(n, n + 1, random_.choice((0.0, 3.0, 150.0)), 0.0) for n in range(ranks - 1))
        profile = Profile(ranks * (1 + number % 3), stages, links, virtual_stages=chunks)
        made = plan(profile)
        plan(profile, current=made)


def test_one_process_at_a_time(tmp_path):
    lock, order = tmp_path / "lock", []

    def other() -> None:
        with module._turn(lock):
            order.append("other")

    thread = threading.Thread(target=other)
    with module._turn(lock):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_it_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    lock, entered = tmp_path / "lock", []
    with module._turn(lock), module._turn(lock):
        entered.append(True)
    assert entered == [True]


def test_a_lock_that_cannot_be_made_or_is_a_trap_is_done_without(tmp_path):
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for path in (tmp_path / "no" / "folder", tmp_path / "link"):
        with module._turn(path):
            pass
    assert (tmp_path / "victim").read_text() == "untouched"
