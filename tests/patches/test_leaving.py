"""A rank leaves in the middle of an iteration: the others end at once, and blame the one that left."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch

from tests.forked import finish_ranks, import_deepspeed, run_ranks, start_ranks
from tests.patches.models import batches, train

import_deepspeed()
pytestmark = [pytest.mark.multiprocess, pytest.mark.timing]

SOON_S = 3.0
"""A chain of ranks that each wait for the next one to end takes 3 s for each."""


def leave_by_exit():
    sys.exit(7)


def leave_by_interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def leave_by_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def leave_at_once():
    os._exit(3)


def job(rank, stages, victim, how, where="forward"):
    """Trains until the victim leaves; how each rank ended, and when."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    left = []

    def leave(*_):
        left.append(time.monotonic())
        how()

    def during(engine, step):
        if step != 1:
            return
        if where == "data":
            data = batches(8, 2, seed=3)
            if rank == victim:

                def short():
                    yield from data[:3]
                    left.append(time.monotonic())

                engine.train_batch(short())
            else:
                engine.train_batch(iter(data))
        elif where == "between" and rank == victim:
            leave()
        elif rank == victim and where == "optimizer":
            engine.optimizer.step = leave
        elif rank == victim:
            forwards = iter(range(100))

            def at_the_fourth(*_):
                if next(forwards) == 3:
                    leave()

            engine.module.register_forward_pre_hook(at_the_fourth)
        if where == "evaluation":
            engine.eval_batch(iter(batches(8, 2, seed=5)))

    try:
        train({}, {}, [8] * 4, stages=stages, during=during)
    except BaseException as error:  # noqa: BLE001
        return type(error).__name__, str(error), left[0] if left else time.monotonic(), time.monotonic()
    return "nothing", "", 0.0, 0.0


CASES = {
    "exit of the last rank": (3, leave_by_exit, "forward", "SystemExit", "it ended with SystemExit: 7"),
    "exit of the coordinator": (0, leave_by_exit, "forward", "SystemExit", "it ended with SystemExit: 7"),
    "interrupt in the middle": (2, leave_by_interrupt, "forward", "KeyboardInterrupt", "KeyboardInterrupt"),
    "end of the data, last rank": (3, None, "data", "StopIteration", "it ran out of data"),
    "end of the data, first rank": (0, None, "data", "StopIteration", "it ran out of data"),
    "out of memory": (1, leave_by_memory, "forward", "OutOfMemoryError", "CUDA out of memory"),
    "optimizer": (1, leave_by_memory, "optimizer", "OutOfMemoryError", "CUDA out of memory"),
    "evaluation": (2, leave_by_exit, "evaluation", "SystemExit", "it ended with SystemExit: 7"),
    "exit between iterations": (2, leave_by_exit, "between", "SystemExit", "it has ended and closed its connections"),
}


def assert_all_end_soon(outcomes, victim, kind, why):
    name, _, left, ended = outcomes[victim].value
    assert name == kind
    assert ended - left < 1.0, "the rank itself hears of its own error at once"
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.value is not None, outcome.error
            name, text, _, ended = outcome.value
            assert name == "PeerLostError", (outcome.rank, name, text)
            assert f"rank {victim} (stage {victim}, " in text.split("is lost")[0], text
            assert why in text, text
            assert ended - left < SOON_S, f"rank {outcome.rank} went on for {ended - left:.1f} s"


@pytest.mark.parametrize("case", CASES)
def test_all_end_at_once_and_blame_the_rank_that_left(case):
    victim, how, where, kind, why = CASES[case]
    assert_all_end_soon(finish_ranks(start_ranks(job, 4, 4, victim, how, where), timeout=60), victim, kind, why)


def test_eight_stages_end_as_soon_as_four():
    outcomes = finish_ranks(start_ranks(job, 8, 8, 7, leave_by_exit), timeout=90)
    assert_all_end_soon(outcomes, 7, "SystemExit", "SystemExit: 7")


def test_a_process_that_is_gone_is_blamed_too():
    outcomes = finish_ranks(start_ranks(job, 4, 4, 2, leave_at_once), timeout=60)
    assert outcomes[2].exitcode == 3
    for outcome in outcomes:
        if outcome.rank != 2:
            name, text, *_ = outcome.value
            assert name == "PeerLostError" and "rank 2 (stage 2, " in text.split("is lost")[0], text


class Enough(Exception):
    pass


def together(rank):
    """An exception that every rank raises in the same place, and catches, ends nothing."""

    def during(engine, step):
        if step != 1:
            return
        stepping, engine.optimizer.step = engine.optimizer.step, lambda *_, **__: (_ for _ in ()).throw(Enough())
        with pytest.raises(Enough):
            engine.train_batch(iter(batches(8, 2, seed=3)))
        engine.optimizer.step = stepping
        engine.timers("train_batch").stop()  # else DeepSpeed refuses the next one
        time.sleep(1.0 if rank == 0 else 0.0)  # the other one waits for it in its next iteration, and has heard of it

    return len(train({}, {}, [8] * 4, stages=2, during=during)["losses"])


def test_what_all_ranks_raise_and_catch_ends_nothing():
    assert run_ranks(together, 2) == [4, 4]
