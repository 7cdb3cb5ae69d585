"""How much of Adaptra a Megatron job can have, with reasons.

What a plan cannot bear, the stock schedule runs as it is, with its transfers through the proxy: that is right whatever the
feature computes. Refused is only what Megatron itself would compute wrongly, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

from adaptra_plugin.patches.megatron_split import delays
from adaptra_plugin.support import Level, Reason, Rule, in_stock_order, judge, refused

OTHERWISE = "adaptra_plugin.deactivate() runs the stock schedule"
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
    """Whether one CUDA graph replays whole iterations, transfers included."""
    scopes = getattr(config, "cuda_graph_scope", None)
    each = scopes if isinstance(scopes, list | tuple | set) else str(scopes).split(",")
    graphs = _graphs(Settings(config))
    return graphs and any(str(getattr(scope, "name", scope)).endswith("full_iteration") for scope in each)


def _dropouts(job: Settings) -> list[str]:
    return [name for name in ("hidden_dropout", "attention_dropout") if job.get(name, 0.0)]


def _fp8_with_history(job: Settings) -> bool:
    recipe = job.get("fp8_recipe") or "delayed"
    return bool(job.get("fp8")) and str(getattr(recipe, "value", recipe)) not in ORDERLESS_FP8


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
        lambda job: _on("cpu_offloading", "fine_grained_activation_offloading")(job),
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
        lambda job: job.chunks > 1 and bool(_dropouts(job)),
        in_stock_order(
            "with several model chunks a rank, the masks of hidden_dropout and attention_dropout would depend on the plan: a rank "
            "draws them in the order in which its chunks run",
            "plans need both to be 0",
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


def reasons_of_model(chunks: Sequence[Any], config: Any) -> list[Reason]:
    """Why a model has less than the full support: wrappers that reduce gradients in ways that count on the stock schedule, and layers
    that draw random numbers.
    """
    found: list[Reason] = []
    names = {base.__name__ for chunk in chunks for base in type(chunk).__mro__}
    if sharded := sorted(name for name in names if "FullyShardedDataParallel" in name or "FSDP" in name):
        found.append(
            in_stock_order(f"{sharded[0]} gathers weights anew in each pass", "plans need DistributedDataParallel")
        )
    if config.no_sync_func is None and any(overlaps(chunk) for chunk in chunks):
        found.append(
            in_stock_order(
                "overlap_grad_reduce is on and the configuration has no no_sync_func",
                "plans need no_sync_func to be model.no_sync",
            )
        )
    for chunk in chunks:
        settings = getattr(chunk, "ddp_config", None)
        if settings is None and not sharded and config.no_sync_func is not None and config.grad_sync_func is None:
            found.append(
                in_stock_order(
                    f"{type(chunk).__name__} reduces gradients in its last backward pass, which is not known while plans may change",
                    "plans need Megatron's DistributedDataParallel, or a grad_sync_func",
                )
            )
        delayed = any(delays(layer) for layer in chunk.modules()) and not config.gradient_accumulation_fusion
        if delayed and not getattr(settings, "delay_wgrad_compute", False):
            found.append(
                refused(
                    "layers of Transformer Engine delay weight gradients, and nothing adds up those of several microbatches",
                    "set delay_wgrad_compute in the DistributedDataParallelConfig too, or gradient_accumulation_fusion",
                )
            )
        random = {type(layer).__name__ for layer in chunk.modules() if isinstance(layer, _DropoutNd) and layer.p > 0}
        if len(chunks) > 1 and random:
            found.append(
                in_stock_order(
                    f"with {len(chunks)} model chunks a rank, the masks of {', '.join(sorted(random))} layers would depend on the plan",
                    "plans need their p to be 0",
                )
            )
    return list(dict.fromkeys(found))


def reasons_of_call(arguments: Mapping[str, Any], known: Sequence[str], chunks: int) -> list[Reason]:
    """Why a call of the schedule is left to the stock schedule.

    Args:
        arguments: by name.
        known: names of arguments that Adaptra's own loop understands.
        chunks: model chunks of this rank.
    """
    found = []
    if other := sorted(name for name, value in arguments.items() if name not in known and value is not None):
        found.append(
            in_stock_order(f"the arguments {', '.join(other)} are not known", "plans need a supported megatron-core")
        )
    iterators = arguments["data_iterator"]
    if chunks > 1:
        each = iterators if isinstance(iterators, list | tuple) else [iterators] * chunks
        own = [id(iterator) for iterator in each if iterator is not None]
        if len(set(own)) < len(own):
            found.append(
                in_stock_order(
                    "two model chunks share a data iterator, so what they read would depend on the plan",
                    "plans need one for each",
                )
            )
    return found


def reasons_of_shapes(received: Sequence[Any], sent: Sequence[Any]) -> list[Reason]:
    """... because of what `adjust_tensor_shapes_fn` has made of the shapes: in a plan one tensor travels between two stages."""
    if (most := max(len(received), len(sent))) <= 1:
        return []
    return [
        in_stock_order(
            f"adjust_tensor_shapes_fn asks for {most} tensors between two stages",
            "plans need one, for example by concatenating them",
        )
    ]


def reasons_alone(config: Any) -> list[Reason]:
    """What Megatron's schedule without a pipeline, which runs as it is, would compute wrongly: it never asks for weight gradients
    that are delayed."""
    if getattr(config, "delay_wgrad_compute", False) and not getattr(config, "overlap_moe_expert_parallel_comm", False):
        return [
            refused("delay_wgrad_compute is on, and nothing runs what is delayed without a pipeline", "set it to False")
        ]
    return []


def finalizing_starts(chunk: Any) -> bool:
    """Whether `finalize_model_grads` starts the reduction of a model chunk by itself, as it does until gradients have been
    reduced beside a backward pass. It waits there for a reduction that was started before, but with several instances of the
    distributed optimizer it would start another one."""
    instances = getattr(getattr(chunk, "ddp_config", None), "num_distributed_optimizer_instances", 1)
    groups = [*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())]
    return overlaps(chunk) and instances > 1 and any(getattr(group, "is_first_batch", False) for group in groups)


def overlaps(chunk: Any) -> bool:
    """Whether a model chunk reduces gradients beside its backward passes."""
    return bool(getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False))
