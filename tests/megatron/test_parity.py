"""Results of Megatron's pipelines are those of the stock schedules, to the bit."""

from __future__ import annotations

import dataclasses

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.layers import gathered_spec, spread_spec
from tests.megatron.runs import (
    QUIET,
    SLOW,
    STEPS,
    assert_same,
    assert_same_while_a_link_turns_slow,
    both,
    loaded,
    more_in_matrix,
    run,
)

loaded()
pytestmark = pytest.mark.multiprocess

SHAPES = {
    "pp2": (GptJob(pipeline=2), 2),
    "pp4": (GptJob(pipeline=4), 4),
    "tp2": (GptJob(pipeline=2, tensor=2), 4),
    "dp2": (GptJob(pipeline=2), 4),
    "pp2-vpp2": (GptJob(pipeline=2, chunks=2), 2),
    "pp4-vpp2": (GptJob(pipeline=4, chunks=2, layers=8), 4),
    "dp2-vpp2": (GptJob(pipeline=2, chunks=2), 4),
    "tp2-vpp2": (GptJob(pipeline=2, chunks=2, tensor=2), 4),
}
"""Each with the number of ranks."""


@pytest.mark.parametrize("name", SHAPES)
def test_healthy(name):
    job, world = SHAPES[name]
    # stock with several chunks takes multiples of the ranks only
    stock, ours = both(job, world, steps=(8, 8, 4, 8), evaluate_after=(1,))
    assert_same(stock, ours)
    session = ours[0]["status"]["sessions"][0]
    # four in a layer; the last rank has the output layer too, which it does not share
    assert session["split_layers"] == 4 * job.layers // job.pipeline
    assert ours[-1]["status"]["sessions"][0]["split_layers"] == 4 * job.layers // job.pipeline + 1
    assert session["stages"] == job.pipeline * job.chunks


SWITCHING = [name for name in SHAPES if name not in ("pp2-vpp2", "tp2-vpp2")]


@pytest.mark.parametrize("name", more_in_matrix(SWITCHING, "pp4", "tp2", "dp2", "dp2-vpp2"))
def test_a_link_turns_slow_and_plans_change_in_the_middle(name):
    job, world = SHAPES[name]
    assert_same_while_a_link_turns_slow(job, world, iterations=10)


VARIANTS = {
    "bf16": GptJob(dtype="bf16"),
    "fp16-loss-scaling": GptJob(dtype="fp16"),
    "tied-dropout": GptJob(tied=True, dropout=0.1),
    "full-recompute": GptJob(
        dropout=0.1,
        extra={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "selective-recompute": GptJob(extra={"recompute_granularity": "selective"}),
    "no-bias": GptJob(extra={"add_bias_linear": False, "normalization": "RMSNorm"}),
    "plain-optimizer": GptJob(data_parallel_wrapper=False),
    "per-token-loss": GptJob(extra={"calculate_per_token_loss": True}),
}


EACH = [(name, chunks) for name in VARIANTS for chunks in (1, 2)]
LONG = [(name, 2) for name in ("fp16-loss-scaling", "selective-recompute", "no-bias", "plain-optimizer")]


@pytest.mark.parametrize(("name", "chunks"), more_in_matrix(EACH, *LONG))
def test_variants(name, chunks):
    assert_same(*both(dataclasses.replace(VARIANTS[name], chunks=chunks), 2, SLOW))


WIDE = {
    "sequence-parallel": GptJob(tensor=2, extra={"sequence_parallel": True}, spec=spread_spec),
    "sequence-parallel-tied": GptJob(tensor=2, tied=True, extra={"sequence_parallel": True}, spec=spread_spec),
    "distributed-optimizer": GptJob(distributed_optimizer=True),
    "overlapped": GptJob(overlap_grad_reduce=True),
    "overlapped-everything": GptJob(
        dtype="bf16", distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    "aligned": GptJob(
        dtype="bf16", distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, aligned=True
    ),
    "context-parallel": GptJob(context=2, spec=gathered_spec),
}


EACH_WIDE = [(name, chunks) for name in WIDE for chunks in (1, 2)]
LONG_WIDE = [
    (name, 2)
    for name in (
        *("sequence-parallel", "sequence-parallel-tied", "context-parallel"),
        *("distributed-optimizer", "overlapped"),
    )
]


@pytest.mark.parametrize(("name", "chunks"), more_in_matrix(EACH_WIDE, *LONG_WIDE))
def test_variants_with_more_ranks_a_stage(name, chunks):
    assert_same(*both(dataclasses.replace(WIDE[name], chunks=chunks), 4, SLOW))


@pytest.mark.parametrize("chunks", [1, 2])
def test_outputs_that_are_let_go_of(chunks):
    """Stock with two chunks is no measure here: it lets go of outputs while gloo is still sending them."""
    stock = run_ranks(run, 2, GptJob(chunks=chunks), None, STEPS)
    ours = run_ranks(run, 2, GptJob(chunks=chunks, extra={"deallocate_pipeline_outputs": True}), QUIET, STEPS)
    assert_same(stock, ours)


@pytest.mark.parametrize("chunks", [1, 2])
def test_sequences_of_different_lengths(chunks):
    job = GptJob(chunks=chunks, extra={"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"})
    assert_same(*both(job, 2, lengths=(16, 5, 9)))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_evaluation_that_collects_other_data(chunks, first):
    more = {"evaluate_after": (0, 2), "evaluation": {"collect_non_loss_data": True, "first_val_step": first}}
    stock, ours = both(GptJob(chunks=chunks), 2, **more)
    assert_same(stock, ours)
    assert len(ours[-1]["evaluations"][0]) == STEPS[0] and isinstance(ours[-1]["evaluations"][0][0], float)


def test_a_step_that_is_skipped_because_gradients_overflow():
    stock, ours = both(GptJob(dtype="fp16", loss_scale=2.0**32), 2)
    assert_same(stock, ours)
    assert True in stock[0]["skipped"]


def same_shapes(received, sent):
    return list(received), list(sent)


def test_adjusted_shapes():
    assert_same(*both(GptJob(), 2, arguments={"adjust_tensor_shapes_fn": same_shapes}))


def test_a_reduction_that_is_asked_to_be_whole():
    job = GptJob(distributed_optimizer=True, overlap_grad_reduce=True)
    assert_same(*both(job, 4, arguments={"force_all_reduce": True}))


@pytest.mark.parametrize(
    "job", [GptJob(pipeline=4, batched_p2p=True), GptJob(pipeline=4, chunks=2, layers=8, batched_p2p=True)]
)
def test_batched_p2p(job):
    assert_same(*both(job, 4, steps=(8, 4, 8)))


def test_two_ranks_of_two_chunks_with_batched_p2p_are_right_where_stock_is_not():
    """With two ranks, what stock batches for both directions goes to one peer, and gloo matches it by order."""
    right = run_ranks(run, 2, GptJob(chunks=2), None, STEPS)
    ours = run_ranks(run, 2, GptJob(chunks=2, batched_p2p=True), QUIET, STEPS)
    assert_same(right, ours)
