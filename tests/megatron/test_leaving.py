"""A rank leaves in the middle of a schedule of Megatron's: the others end at once, and blame the one that left."""

from __future__ import annotations

import itertools
import sys
import time

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import finish_ranks, start_ranks
from tests.megatron import runs

runs.loaded()
pytestmark = pytest.mark.multiprocess


def job(rank, victim, how):
    left = []

    def leave():
        left.append(time.monotonic())
        if how == "exit":
            sys.exit(7)

    def during(trainer, step):
        if rank == victim and step == 0:
            if how == "data":
                # the data of the next step is too short
                stepping = trainer.step
                trainer.step = lambda data, count, **more: stepping(lambda: itertools.islice(data(), 3), count, **more)
                leave()
            else:
                forwards = iter(range(100))
                trainer.chunks[0].register_forward_pre_hook(lambda *_: leave() if next(forwards) == 3 else None)

    try:
        runs.run(rank, GptJob(pipeline=4), {}, (8, 8, 8), during=during)
    except BaseException as error:  # noqa: BLE001
        return type(error).__name__, str(error), left[0] if left else 0.0, time.monotonic()
    return None


@pytest.mark.parametrize(
    ("victim", "how", "kind", "why"),
    [(2, "exit", "SystemExit", "it ended with SystemExit: 7"), (0, "data", "StopIteration", "it ran out of data")],
)
def test_all_end_at_once_and_blame_the_rank_that_left(victim, how, kind, why):
    outcomes = finish_ranks(start_ranks(job, 4, victim, how), timeout=80)
    name, _, left, _ = outcomes[victim].value
    assert name == kind
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.value is not None, outcome.error
            name, text, _, ended = outcome.value
            assert name == "PeerLostError" and f"rank {victim} (stage {victim}, " in text.split("is lost")[0], text
            assert why in text, text
            assert ended - left < 3.0
