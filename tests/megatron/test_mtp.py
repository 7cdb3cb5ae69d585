"""Results of pipelines that predict several tokens, or whose stages are uneven, are those of the stock schedules, to the bit."""

from __future__ import annotations

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.megatron.moe_models import EXPERTS, fused_layers, predicting
from tests.megatron.runs import assert_same, assert_same_while_a_link_turns_slow, both, loaded, more_in_matrix

loaded()
pytestmark = pytest.mark.multiprocess

STEPS = (8, 4, 8)
"""Microbatches of each iteration."""
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

JOBS = {
    "one": (predicting(1), 2),
    "two-tied-vpp2": (predicting(2, tied=True, chunks=2), 2),
    "two-with-experts": (predicting(2, {**EXPERTS, **BIAS}, dtype="bf16"), 2),
    "two-accumulated-by-a-kernel": (
        predicting(2, {**EXPERTS, "gradient_accumulation_fusion": True}, dtype="bf16", spec=fused_layers),
        2,
    ),
    "layout-vpp2": (predicting(1, {"pipeline_model_parallel_layout": "E|tt|t|tmL"}, chunks=2), 2),
    "tp2-two": (predicting(2, tensor=2), 4),
    "stage-of-its-own": (predicting(1, {"pipeline_model_parallel_layout": "Et|tt|tm|L"}, pipeline=4), 4),
}
"""Each with the number of ranks."""


@pytest.mark.parametrize("name", more_in_matrix(JOBS, "two-accumulated-by-a-kernel", "layout-vpp2", "tp2-two"))
def test_healthy(name):
    job, world = JOBS[name]
    stock, ours = both(job, world, steps=STEPS, evaluate_after=(1,))
    assert_same(stock, ours)
    assert any(result["logged"] for result in stock), "losses of further tokens"
    session = ours[-1]["status"]["sessions"][0]
    assert session["level"] == "full"
    fused = {kind: count for kind, count in session["fused_layers"].items() if "Linear" in kind}
    # the output layer is used for each of the tokens; tied, it has the weight of the embedding, which is looked up in its stage
    assert fused == ({"ColumnParallelLinear": 1} if job.tied else {})


def test_a_link_turns_slow_and_plans_change_in_the_middle():
    assert_same_while_a_link_turns_slow(JOBS["one"][0], 2, microbatches=6)


def test_sequences_of_different_lengths():
    job = predicting(1, {**EXPERTS, "moe_token_dispatcher_type": "alltoall", "variable_seq_lengths": True})
    assert_same(*both(job, 2, steps=STEPS, lengths=(8, 12, 16)))


UNEVEN = {
    "embedding-and-loss-count": (
        GptJob(
            layers=6,
            extra={"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        ),
        2,
    ),
    "first-and-last": (
        GptJob(
            pipeline=4,
            layers=6,
            extra={"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
        ),
        4,
    ),
    "layout-vpp2": (GptJob(chunks=2, extra={"pipeline_model_parallel_layout": "E|ttt|t|L"}), 2),
}
"""Stages of different numbers of layers, down to none, each with the number of ranks."""


@pytest.mark.parametrize("name", more_in_matrix(UNEVEN, "embedding-and-loss-count", "first-and-last"))
def test_uneven_stages(name):
    job, world = UNEVEN[name]
    stock, ours = both(job, world, steps=STEPS)
    assert_same(stock, ours)
    assert len({result["status"]["sessions"][0]["split_layers"] for result in ours}) > 1
