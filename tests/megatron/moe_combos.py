"""Combinations of what mixture of experts and multi-token prediction bring, drawn at random: each trains with stock Megatron-core
and with ours, and has to give the same bits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.combos import Described, StockFails
from tests.forked import run_ranks
from tests.megatron.moe_models import experts, predicting
from tests.megatron.runs import assert_same, run
from tests.switching import CAUSED, FIRST

STEPS = (8, 4, 8, 4, 8, 8)
"""Microbatches of each iteration; the last two run the plan that follows from the first profile."""
SIZES = ((2, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (2, 2, 2))
"""Stages, tensor-parallel ranks, replicas."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "bf16-spread": {"dtype": "bf16", "distributed_optimizer": True},
    "bf16-overlapped": {
        "dtype": "bf16",
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "shared-experts": {"recompute_granularity": "selective", "recompute_modules": ["shared_experts", "core_attn"]},
    "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}
BALANCED: dict[str, dict[str, Any]] = {
    "not": {"moe_router_load_balancing_type": "none"},
    "batch": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    "sequence": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2},
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-2},
    "several": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 1e-3, 1e-2],
    },
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "by-bias": {
        "moe_router_load_balancing_type": "none",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-2,
    },
    "by-bias-and-sequence": {
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-2,
    },
}
LIMITED: dict[str, dict[str, Any]] = {
    "not": {},
    "dropping": {"moe_expert_capacity_factor": 1.0},
    "dropping-by-position": {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "position"},
    "padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}
SHARED: dict[str, dict[str, Any]] = {
    "no": {},
    "yes": {"moe_shared_expert_intermediate_size": 32},
    "gated": {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
    "overlapped": {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True},
}
LAYOUTS: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {
    (2, 1): (
        {"pipeline_model_parallel_layout": "Et|tttmL"},
        {"pipeline_model_parallel_layout": "Ettt|tmL"},
        {"num_layers_in_first_pipeline_stage": 1},
        {"num_layers_in_last_pipeline_stage": 1},
    ),
    (2, 2): (
        {"pipeline_model_parallel_layout": "Et|t|tt|mL"},
        {"pipeline_model_parallel_layout": "E|tt|t|tmL"},
    ),
    (4, 1): (
        {"pipeline_model_parallel_layout": "Et|tt|t|mL"},
        {"pipeline_model_parallel_layout": "Et|tt|tm|L"},
        {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
    ),
    (4, 2): ({"pipeline_model_parallel_layout": "E|t|t|t|t|tt|tt|mL"},),
}
"""Other stages than even ones, by stages and model chunks of a rank; `m` stands for all layers of multi-token prediction."""


@dataclass(frozen=True)
class Combo(Described):
    """One job; names are those of the tables above.

    Attributes:
        stages: ranks of a pipeline.
        expert: ranks that share the experts of a layer; 0: a dense model.
        depth: further tokens that are predicted.
        slow: whether a link is slow.
    """

    stages: int
    tensor: int
    data: int
    chunks: int
    expert: int
    expert_tensor: int | None
    depth: int
    precision: str
    recomputed: str
    balanced: str
    limited: str
    shared: str
    dispatcher: str
    top: int
    z_loss: bool
    gated: bool
    router: str | None
    per_token: bool
    tied: bool
    layout: dict[str, Any]
    slow: bool
    dropout: float

    @classmethod
    def draw(cls, seed: int) -> Combo:
        choose = random.Random(seed)
        one = choose.choice
        stages, tensor, data = one(SIZES)
        chunks = one((1, 2))
        depth = one((0, 0, 1, 2))
        dense = depth > 0 and choose.random() < 0.4
        shared = "no" if dense else one(list(SHARED))
        limited = "not" if dense else one(["not", *LIMITED])
        balanced = one(list(BALANCED))
        if limited != "not" and balanced not in ("not", "batch", "sequence"):
            balanced = "batch"  # Megatron's own rule
        recomputed = one(
            [name for name in RECOMPUTED if name not in (("experts", "shared-experts") if dense else ("mlp",))]
        )
        if recomputed == "shared-experts" and shared != "yes":
            recomputed = "attention"
        expert = 0 if dense else one((1, 2)) if tensor * data > 1 else 1
        drawn = cls(
            stages=stages,
            tensor=tensor,
            data=data,
            chunks=chunks,
            expert=expert,
            expert_tensor=1 if tensor > 1 and (data == 1 or choose.random() < 0.5) else None,
            depth=depth,
            precision=one(list(PRECISIONS)),
            recomputed=recomputed,
            balanced=balanced,
            limited=limited,
            shared=shared,
            dispatcher="alltoall" if "overlapped" in shared or limited == "padded" else one(("allgather", "alltoall")),
            top=one((1, 2)),
            z_loss=choose.random() < 0.3,
            gated=choose.random() < 0.3,
            router=one((None, None, "fp32", "fp64")),
            per_token=choose.random() < 0.2,
            tied=choose.random() < 0.3,
            layout=one(LAYOUTS[stages, chunks]) if choose.random() < 0.4 else {},
            slow=choose.random() < 0.7,
            dropout=one((0.0, 0.0, 0.1)),
        )
        # beside multi-token prediction a tied output layer keeps a weight that nothing uses: Megatron's buckets wait for it
        return replace(drawn, tied=False) if depth and drawn.precision == "bf16-overlapped" else drawn

    @property
    def ranks(self) -> int:
        return self.stages * self.tensor * self.data

    @property
    def job(self) -> GptJob:
        extra: dict[str, Any] = {**RECOMPUTED[self.recomputed], "add_bias_linear": False}
        if self.gated:
            extra |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
        if self.per_token:
            extra["calculate_per_token_loss"] = True
        for name, value in self.layout.items():
            extra[name] = value.replace("m", "m" * self.depth) if isinstance(value, str) else value
        if self.depth:
            extra["mtp_num_layers"] = self.depth
        job: dict[str, Any] = {
            **PRECISIONS[self.precision],
            "pipeline": self.stages,
            "chunks": self.chunks,
            "tensor": self.tensor,
            "layers": 8 if self.stages * self.chunks == 8 else 4,
            "sequence": 8,
            "tied": self.tied,
            "dropout": self.dropout,
        }
        if not self.expert:
            return predicting(self.depth, extra, **job)
        extra |= {
            **BALANCED[self.balanced],
            **LIMITED[self.limited],
            **SHARED[self.shared],
            "moe_token_dispatcher_type": self.dispatcher,
            "moe_router_topk": self.top,
            "moe_router_pre_softmax": self.top == 1,
        }
        if self.z_loss:
            extra["moe_z_loss_coeff"] = 1e-3
        if self.router:
            extra["moe_router_dtype"] = self.router
        return experts(extra, expert=self.expert, expert_tensor=self.expert_tensor, **job)

    @property
    def adaptra(self) -> dict[str, Any]:
        links = [{"src": 0, "dst": 1, "latency_ms": 25}] if self.slow else []
        return {**CAUSED, "simulate": {"links": links}}


def compare(combo: Combo, timeout: float = 100.0) -> list[dict[str, Any]]:
    """Trains a combination in stock and in ours.

    Returns what Adaptra says of each rank.

    Raises:
        AssertionError: something differs, or ours fails.
        StockFails: stock does.
    """
    evaluate = {"evaluate_after": (1,)}
    try:
        stock = run_ranks(run, combo.ranks, combo.job, None, STEPS, timeout=timeout, **evaluate)
    except AssertionError as error:
        raise StockFails(str(error)) from None
    # with dropout and several chunks the first iteration is stock's
    after = FIRST + (combo.dropout > 0 and combo.chunks > 1)
    ours = run_ranks(
        run, combo.ranks, combo.job, combo.adaptra, STEPS, timeout=timeout, plans_after=(after,), **evaluate
    )
    assert_same(stock, ours)
    sessions = [result["status"]["sessions"][0] for result in ours]
    assert {session["level"] for session in sessions} == {"full"}
    assert all(session["split_layers"] for session in sessions if session["fused_layers"])
    (version,) = {session["plan_version"] for session in sessions}
    assert version >= 1
    return sessions
