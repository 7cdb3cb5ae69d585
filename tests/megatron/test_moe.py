"""Results of pipelines with mixture of experts are those of the stock schedules, to the bit."""

from __future__ import annotations

import pytest

from tests.megatron.moe_combos import Combo, compare
from tests.megatron.moe_models import experts
from tests.megatron.runs import SLOW, assert_same, assert_same_while_a_link_turns_slow, both, loaded, more_in_matrix

loaded()
pytestmark = pytest.mark.multiprocess

BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
BALANCED = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-2}
SHARED = {"moe_shared_expert_intermediate_size": 32}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SMALL = (6, 4, 6)
"""Microbatches of each iteration."""

JOBS = {
    "bias-shared": (experts({**BIAS, **SHARED}), 2),
    "global-vpp2": (experts({**BALANCED, "moe_z_loss_coeff": 1e-3}, chunks=2), 2),
    "full-recompute-jitter": (
        experts({**BALANCED, **BIAS, **FULL, "moe_input_jitter_eps": 1e-2}, dtype="bf16", dropout=0.1),
        2,
    ),
    "recomputed-experts-vpp2": (
        experts({**BIAS, **SHARED, "recompute_granularity": "selective", "recompute_modules": ["moe"]}, chunks=2),
        2,
    ),
    "top-1-dropping": (
        experts({"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_expert_capacity_factor": 0.5}),
        2,
    ),
    "padded-overlapped": (
        experts(
            {
                **ALLTOALL,
                **SHARED,
                "moe_shared_expert_overlap": True,
                "moe_expert_capacity_factor": 1.0,
                "moe_pad_expert_input_to_capacity": True,
            }
        ),
        2,
    ),
    "ep2": (experts(BALANCED, expert=2, distributed_optimizer=True, dtype="bf16"), 4),
    "ep2-alltoall-vpp2": (experts({**ALLTOALL, **BIAS}, expert=2, chunks=2), 4),
    "tp2-ep2": (experts({**ALLTOALL, **SHARED}, tensor=2, expert=2, expert_tensor=1), 4),
    "tp2": (experts({"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2}, tensor=2), 4),
}
"""Each with the number of ranks."""


@pytest.mark.parametrize("name", more_in_matrix(JOBS, "tp2"))
def test_healthy(name):
    job, world = JOBS[name]
    stock, ours = both(job, world, steps=SMALL, evaluate_after=(1,))
    assert_same(stock, ours)
    for result in ours:
        session = result["status"]["sessions"][0]
        assert session["level"] == "full" and session["split_layers"]
        # what is left: norms, embeddings, routers, and the gate of a shared expert
        assert not any("Linear" in kind for kind in session["fused_layers"])


@pytest.mark.parametrize("name", more_in_matrix(["bias-shared", "ep2"], "bias-shared"))
def test_a_link_turns_slow_and_plans_change_in_the_middle(name):
    job, world = JOBS[name]
    assert_same_while_a_link_turns_slow(job, world, microbatches=6)


def test_experts_without_tokens():
    """More experts than tokens of a microbatch: some have none, first of all while they are observed."""
    job = experts(
        {**BIAS, "num_moe_experts": 8, "moe_router_topk": 1, "moe_ffn_hidden_size": 8}, micro_batch=1, sequence=4
    )
    assert_same(*both(job, 2, SLOW, steps=(6, 6, 6)))


SEEDS = (*range(16), 20, 27, 38)
"""The last ones with eight ranks."""


@pytest.mark.matrix
@pytest.mark.parametrize("seed", SEEDS)
def test_combination(seed):
    compare(Combo.draw(seed))
