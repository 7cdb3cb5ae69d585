"""How much of Adaptra a configuration of Megatron can have, with reasons. Imports neither torch nor Megatron.

What a plan cannot bear, the stock schedule runs as it is, with its transfers through the proxy: that is right whatever the
feature computes. Refused is only what Megatron itself would compute wrongly, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.support import Level, Reason, Rule, in_stock_order, judge, refused

DRAWING = (
    *("hidden_dropout", "attention_dropout", "moe_input_jitter_eps"),
    *("moe_router_force_load_balancing", "moe_router_force_biased"),
)
"""Fields with which forwards draw random numbers."""
ORDERLESS_FP8 = ("tensorwise", "blockwise", "mxfp8")
"""Recipes of fp8 that compute a scale from each tensor alone."""


@dataclass(frozen=True)
class Settings:
    """What is judged. `config`: Megatron's `TransformerConfig`, or what has its fields. `chunks`: model chunks of a rank."""

    config: Any
    chunks: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.config, name, default)


def _on(*names: str) -> Callable[[Settings], bool]:
    return lambda job: any(bool(job.get(name)) for name in names)


def _graphs(job: Settings) -> bool:
    return job.get("cuda_graph_impl", "none") not in ("none", None) or _on("enable_cuda_graph", "external_cuda_graph")(
        job
    )


def whole_graph(config: Any) -> bool:
    """Whether one CUDA graph replays whole iterations, transfers included. Newer versions call it a kind of graph, older ones a scope."""
    if getattr(config, "cuda_graph_impl", None) == "full_iteration":
        return True
    scopes = getattr(config, "cuda_graph_scope", None)
    each = scopes if isinstance(scopes, list | tuple | set) else str(scopes).split(",")
    graphs = _graphs(Settings(config))
    return graphs and any(str(getattr(scope, "name", scope)).endswith("full_iteration") for scope in each)


def _fp8_with_history(job: Settings) -> bool:
    recipe = job.get("fp8_recipe") or "delayed"
    return bool(job.get("fp8")) and str(getattr(recipe, "value", recipe)) not in ORDERLESS_FP8


def asks_for_delayed(config: Any) -> bool:
    """Whether Megatron itself runs weight gradients that layers delay, inside of its own backward."""
    return any(
        getattr(config, name, False)
        for name in ("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad")
    )


RULES: tuple[Rule, ...] = (
    (
        lambda job: whole_graph(job.config),
        Reason(
            Level.STOCK,
            "a CUDA graph of whole iterations (full_iteration) replays the transfers without asking the host",
            "plans and delegated transfers need another cuda_graph_scope",
        ),
    ),
    (
        lambda job: _graphs(job) and not whole_graph(job.config),
        in_stock_order(
            "CUDA graphs replay the order of microbatches in which they were captured", "plans need them switched off"
        ),
    ),
    (
        _on("overlap_moe_expert_parallel_comm"),
        in_stock_order(
            "overlap_moe_expert_parallel_comm runs forwards and backwards merged into each other",
            "plans need it switched off",
        ),
    ),
    (
        _fp8_with_history,
        in_stock_order(
            "fp8 with delayed scaling keeps scaling factors that are updated in the stock order of microbatches",
            f"plans need fp8_recipe to be one of {', '.join(ORDERLESS_FP8)}",
        ),
    ),
    (
        lambda job: bool(job.get("fp8")) and _on("fp8_dot_product_attention", "fp8_multi_head_attention")(job),
        in_stock_order(
            "attention in fp8 keeps scaling factors that are updated in the stock order of microbatches, whatever the recipe",
            "plans need fp8_dot_product_attention and fp8_multi_head_attention to be off",
        ),
    ),
    (
        _on("overlap_dispatch_backward_with_experts_wgrad"),
        in_stock_order(
            "overlap_dispatch_backward_with_experts_wgrad runs the experts' weight gradients inside of the backward",
            "plans need it switched off",
        ),
    ),
    (
        _on("fp4"),
        in_stock_order("fp4 rounds at random, in the stock order of microbatches", "plans need fp8 or bf16"),
    ),
    (
        _on("defer_embedding_wgrad_compute"),
        in_stock_order(
            "defer_embedding_wgrad_compute defers the weight gradients of the output layer to the end, plans to when there is time",
            "plans need it switched off",
        ),
    ),
    (
        lambda job: job.get("num_microbatches_with_partial_activation_checkpoints") is not None,
        in_stock_order(
            "num_microbatches_with_partial_activation_checkpoints counts on the warm-ups of the stock schedule",
            "plans need it to be None",
        ),
    ),
    (
        _on("cpu_offloading", "fine_grained_activation_offloading"),
        in_stock_order(
            "offloaded activations (cpu_offloading, fine_grained_activation_offloading) are fetched back in the stock order of "
            "microbatches",
            "plans need them switched off, and max_activations to be what a stage can hold",
        ),
    ),
    (
        _on("moe_paged_stash"),
        in_stock_order("moe_paged_stash stores activations in the stock order of microbatches", "plans need it off"),
    ),
    (
        _on("hybrid_context_parallel"),
        in_stock_order("hybrid context parallelism brings a schedule of its own", "plans need it off"),
    ),
    (
        lambda job: any(
            (job.get(name, 1) or 1) > 1 for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
        ),
        in_stock_order(
            "weights that are spread and gathered anew in each pass (gtp_weight_remat_size) count on the stock order",
            "plans need it to be 1",
        ),
    ),
    (
        _on("use_kitchen", "quant_recipe"),
        in_stock_order(
            "the quantisation of Kitchen (use_kitchen) and a quant_recipe have not been verified with plans",
            "plans need them switched off",
        ),
    ),
    (
        lambda job: job.chunks > 1 and bool(job.get("variable_seq_lengths")) and _on(*DRAWING)(job),
        in_stock_order(
            f"with several model chunks a rank and variable_seq_lengths, random numbers ({', '.join(DRAWING)}) would depend on the "
            "plan: how much a forward draws is not known before",
            "plans need forwards that draw none",
        ),
    ),
    (
        _on("use_megatron_fsdp", "use_torch_fsdp2"),
        in_stock_order("fully sharded data parallelism gathers weights anew in each pass", "plans need it off"),
    ),
    (
        lambda job: bool(job.get("overlap_p2p_comm") and job.get("batch_p2p_comm")),
        refused(
            "overlap_p2p_comm and batch_p2p_comm exclude each other (Megatron refuses them too)",
            "set one of them to False",
        ),
    ),
)
"""What follows from Megatron's configuration."""


def reasons_of_config(config: Any, chunks: int) -> list[Reason]:
    """Why a model configuration has less than the full support.

    Args:
        config: Megatron's (a `TransformerConfig`), or anything with its fields.
        chunks: model chunks of a rank.
    """
    return judge(RULES, Settings(config, chunks))
