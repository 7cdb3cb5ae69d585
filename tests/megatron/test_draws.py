"""Random numbers of ranks with several model chunks are those of the stock order, whatever the plan."""

from __future__ import annotations

import itertools

import pytest
import torch

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.moe_models import experts
from tests.megatron.runs import QUIET, assert_same, both, loaded, more_in_matrix, run
from tests.switching import CAUSED, FIRST

loaded()
pytestmark = pytest.mark.multiprocess

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
STEPS = (8, 4, 8, 4, 8, 8)
"""Microbatches of each iteration; the first runs by the stock schedule, the last by a plan with another order of forwards."""
MEASURED = FIRST + 1
"""The first iteration of the plug-in is the second of the job."""
JOBS = {
    "dropout": (GptJob(chunks=2, dropout=0.1), 2),
    "dropout-recomputed": (GptJob(chunks=2, dropout=0.1, tied=True, dtype="bf16", extra=FULL), 2),
    "jitter": (experts({"moe_input_jitter_eps": 1e-2}, chunks=2), 2),
    "random-routes": (experts({"moe_router_force_load_balancing": True, **FULL}, chunks=2, dropout=0.1), 2),
}
"""Each with the number of ranks."""


@pytest.mark.parametrize("name", more_in_matrix(JOBS, "dropout-recomputed", "random-routes"))
def test_plans_for_measured_times_in_which_chunks_take_turns_otherwise(name):
    job, world = JOBS[name]
    assert_same(*both(job, world, CAUSED, steps=STEPS, evaluate_after=(0, 4), plans_after=(MEASURED,)))


def test_a_link_turns_slow_and_plans_change_in_the_middle():
    links = [{"src": 0, "dst": 1, "latency_ms": 25, "from_iteration": 5}]
    job, world = JOBS["dropout"]
    block = {**CAUSED, "simulate": {"links": links}}
    stock, ours = both(job, world, block, steps=(8,) * 10, plans_after=(MEASURED, 6))
    assert_same(stock, ours)
    versions = {result["status"]["sessions"][0]["plan_version"] for result in ours}
    assert len(versions) == 1 and versions.pop() >= 2, "at first from measured times, then for the slow link"


def draw_more(trainer, step):
    if step == 1:
        for chunk in trainer.chunks:
            chunk.register_forward_pre_hook(lambda *_: torch.rand(1) and None)


def test_forwards_that_draw_another_amount_end_the_job():
    with pytest.raises(AssertionError, match="has drawn another amount of random numbers than those of model chunk 0"):
        run_ranks(run, 2, GptJob(chunks=2, dropout=0.1), QUIET, STEPS, during=draw_more)


def sometimes(model):
    """The first chunk of the first rank draws one or two numbers more."""
    calls = itertools.count()

    def draw(*_):
        torch.rand(next(calls) % 2 + 1)

    if model.pre_process:
        model.register_forward_pre_hook(draw)


def test_forwards_that_do_not_all_draw_as_much_have_the_stock_order():
    """It shows on one rank only."""
    job = GptJob(chunks=2, dropout=0.1, prepare=sometimes)
    stock, ours = both(job, 2, steps=STEPS)
    assert_same(stock, ours)
    sessions = [result["status"]["sessions"][0] for result in ours]
    assert all(session["level"] == "stock-order" for session in sessions)
    assert all("model chunk 0 draw different amounts" in session["reasons"][0] for session in sessions)


def counted(rank):
    from adaptra_plugin.patches import megatron_draws

    states = [torch.tensor([7, offset]).view(torch.uint8) for offset in (4, 12)]
    assert megatron_draws._philox_count(*states) == 8
    assert torch.equal(megatron_draws._advanced(states[0], 8), states[1])
    assert megatron_draws._philox_count(states[1], states[0]) is None, "seeded anew"
    for size in (1, 100, 623, 624, 5000):
        torch.manual_seed(size)
        before = torch.get_rng_state()
        torch.rand(size)
        assert megatron_draws._twister_count(before, torch.get_rng_state()) == size
        assert torch.equal(megatron_draws._advanced(before, size), torch.get_rng_state())


def test_states_of_generators_are_counted_with():
    run_ranks(counted, 1)
