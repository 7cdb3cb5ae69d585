"""How much of Adaptra a Megatron job can have by what is known when it runs: its model and the calls of its schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.transformer.moe import moe_utils

from adaptra_plugin.patches.megatron_draws import draws
from adaptra_plugin.patches.megatron_rules import asks_for_delayed
from adaptra_plugin.patches.megatron_te import delays
from adaptra_plugin.support import Reason, in_stock_order, refused

OTHERWISE = "adaptra_plugin.deactivate() runs the stock schedule"


def reasons_of_model(chunks: Sequence[Any], config: Any) -> list[Reason]:
    """Why a model has less than the full support: wrappers that reduce gradients in ways that count on the stock schedule, and layers
    that delay weight gradients which nobody would ask for.
    """
    found: list[Reason] = []
    asked = asks_for_delayed(config)
    if getattr(config, "moe_router_force_load_balancing", False) and hasattr(
        getattr(moe_utils, "RandomSTE", None), "generator"
    ):
        found.append(
            in_stock_order(
                "moe_router_force_load_balancing draws from a generator of its own in this version, in the stock order of microbatches",
                "plans need a newer megatron-core",
            )
        )
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
        if delayed and not asked and not getattr(settings, "delay_wgrad_compute", False):
            found.append(
                refused(
                    "layers of Transformer Engine delay weight gradients, and nothing adds up those of several microbatches",
                    "set delay_wgrad_compute in the DistributedDataParallelConfig too, or gradient_accumulation_fusion",
                )
            )
        if draws(chunks, config) and not asked and any(delays(layer) for layer in chunk.modules()):
            found.append(
                refused(
                    f"with {len(chunks)} model chunks a rank and dropout the first iteration runs by the stock schedule, which asks "
                    "for no delayed weight gradients",
                    "set delay_wgrad_compute to False, or dropout to 0",
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
    if getattr(config, "delay_wgrad_compute", False) and not asks_for_delayed(config):
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
