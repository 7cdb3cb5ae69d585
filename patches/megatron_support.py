"""What Megatron jobs Adaptra refuses, each with a reason and a remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

from adaptra_plugin.errors import refuse
from adaptra_plugin.patches.megatron_te import delays

_refuse = functools.partial(refuse, otherwise="adaptra_plugin.deactivate() runs the stock schedule")
Check = tuple[Callable[[Any], bool], str, str]


def _on(name: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config, name, None))


def _graphs(config: Any) -> bool:
    return getattr(config, "cuda_graph_impl", "none") not in ("none", None) or any(
        getattr(config, name, False) for name in ("enable_cuda_graph", "external_cuda_graph")
    )


REFUSED: tuple[Check, ...] = (
    (
        _on("overlap_moe_expert_parallel_comm"),
        "overlap_moe_expert_parallel_comm runs forwards and backwards merged into each other",
        "set it to False",
    ),
    (_on("num_moe_experts"), "mixture of experts has not been verified with a split backward", "use a dense model"),
    (_on("mtp_num_layers"), "multi-token prediction has not been verified with plans", "set mtp_num_layers to None"),
    (_graphs, "CUDA graphs replay the order of microbatches in which they were captured", "switch them off"),
    (_on("fp8"), "fp8 keeps scaling factors that are updated in the stock order of microbatches", "train in bf16"),
    (_on("fp4"), "fp4 keeps scaling factors that are updated in the stock order of microbatches", "train in bf16"),
    (
        _on("defer_embedding_wgrad_compute"),
        "defer_embedding_wgrad_compute defers the weight gradients of the output layer to the end, Adaptra to when there is time",
        "set it to False",
    ),
    (
        lambda config: getattr(config, "num_microbatches_with_partial_activation_checkpoints", None) is not None,
        "num_microbatches_with_partial_activation_checkpoints counts on the warm-ups of the stock schedule",
        "set it to None",
    ),
    (
        _on("cpu_offloading"),
        "cpu_offloading fetches activations back in the stock order of microbatches",
        "set it to False, and max_activations to what a stage can hold",
    ),
    (
        _on("fine_grained_activation_offloading"),
        "fine_grained_activation_offloading fetches activations back in the stock order of microbatches",
        "set it to False, and max_activations to what a stage can hold",
    ),
    (_on("hybrid_context_parallel"), "hybrid context parallelism brings a schedule of its own", "set it to False"),
    (
        _on("moe_paged_stash"),
        "moe_paged_stash stores activations in the stock order of microbatches",
        "set it to False",
    ),
    (
        lambda config: any(
            (getattr(config, name, 1) or 1) > 1 for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
        ),
        "weights that are spread and gathered anew in each pass (gtp_weight_remat_size) count on the stock order",
        "set it to 1",
    ),
    (_on("use_kitchen"), "the quantisation of Kitchen has not been verified with plans", "set use_kitchen to False"),
    (_on("quant_recipe"), "a quant_recipe has not been verified with plans", "set it to None"),
    (
        lambda config: bool(getattr(config, "overlap_p2p_comm", False) and getattr(config, "batch_p2p_comm", False)),
        "overlap_p2p_comm and batch_p2p_comm exclude each other (Megatron refuses them too)",
        "set one of them to False",
    ),
)
"""(predicate on Megatron's configuration, reason, remedy)."""


def check_config(config: Any, chunks: int) -> None:
    """Refuses a model configuration that cannot run with Adaptra.

    Args:
        config: Megatron's (a `TransformerConfig`).
        chunks: model chunks of a rank.

    Raises:
        UnsupportedError: one line per reason, each with its remedy.
    """
    found = [(reason, remedy) for predicate, reason, remedy in REFUSED if predicate(config)]
    dropout = [name for name in ("hidden_dropout", "attention_dropout") if getattr(config, name, 0.0)]
    if chunks > 1 and dropout:
        found.append(
            (
                f"with {chunks} model chunks a rank, the masks of {' and '.join(dropout)} would depend on the plan: a rank "
                "draws them in the order in which its chunks run",
                f"set {' and '.join(dropout)} to 0",
            )
        )
    _refuse(found)


def check_model(chunks: Sequence[Any], config: Any) -> None:
    """Refuses wrappers of the model whose gradients are reduced in ways that count on the stock schedule.

    Raises:
        UnsupportedError: fully sharded data parallelism, or overlapped reduction without `no_sync_func`.
    """
    found = []
    names = {base.__name__ for chunk in chunks for base in type(chunk).__mro__}
    if sharded := sorted(name for name in names if "FullyShardedDataParallel" in name or "FSDP" in name):
        found.append((f"{sharded[0]} shards weights per backward pass", "use DistributedDataParallel"))
    if config.no_sync_func is None and any(overlaps(chunk) for chunk in chunks):
        found.append(
            ("overlap_grad_reduce is on and the configuration has no no_sync_func", "set no_sync_func to model.no_sync")
        )
    for chunk in chunks:
        settings = getattr(chunk, "ddp_config", None)
        if settings is None and config.no_sync_func is not None and config.grad_sync_func is None:
            found.append(
                (
                    f"{type(chunk).__name__} reduces gradients in its last backward pass, which is not known while plans may change",
                    "use Megatron's DistributedDataParallel, or set grad_sync_func",
                )
            )
        delayed = any(delays(layer) for layer in chunk.modules()) and not config.gradient_accumulation_fusion
        if delayed and not getattr(settings, "delay_wgrad_compute", False):
            found.append(
                (
                    "layers of Transformer Engine delay weight gradients, and nothing adds up those of several microbatches",
                    "set delay_wgrad_compute in the DistributedDataParallelConfig too, or gradient_accumulation_fusion",
                )
            )
        random = {type(layer).__name__ for layer in chunk.modules() if isinstance(layer, _DropoutNd) and layer.p > 0}
        if len(chunks) > 1 and random:
            found.append(
                (
                    f"with {len(chunks)} model chunks a rank, the masks of {', '.join(sorted(random))} layers would depend on the plan",
                    "set their p to 0",
                )
            )
    _refuse(list(dict.fromkeys(found)))


def check_alone(config: Any) -> None:
    """Refuses what Megatron's schedule without a pipeline, which runs as it is, would compute wrongly.

    Raises:
        UnsupportedError: weight gradients are delayed, and that schedule never asks for them.
    """
    if getattr(config, "delay_wgrad_compute", False) and not getattr(config, "overlap_moe_expert_parallel_comm", False):
        _refuse([("delay_wgrad_compute is on, and nothing runs what is delayed without a pipeline", "set it to False")])


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


def check_call(arguments: Mapping[str, Any], known: Sequence[str], chunks: int) -> None:
    """Refuses a call of the schedule that Adaptra cannot answer.

    Raises:
        UnsupportedError: arguments of a version that is not known, several modules in one pipeline, or shared data iterators.
    """
    found = []
    if other := sorted(name for name, value in arguments.items() if name not in known and value is not None):
        found.append((f"the arguments {', '.join(other)} are not known", "use a supported version of megatron-core"))
    for name in ("pg_collection", "p2p_communicator"):
        if "MultiModule" in type(arguments.get(name)).__name__:
            found.append(("several modules share one pipeline", "use one model a pipeline"))
    iterators = arguments["data_iterator"]
    if chunks > 1:
        each = iterators if isinstance(iterators, list | tuple) else [iterators] * chunks
        own = [id(iterator) for iterator in each if iterator is not None]
        if len(set(own)) < len(own):
            found.append(
                (
                    "two model chunks share a data iterator, so what they read would depend on the plan",
                    "give each its own",
                )
            )
    _refuse(found)


def check_shapes(received: Sequence[Any], sent: Sequence[Any]) -> None:
    """Refuses what `adjust_tensor_shapes_fn` has made of the shapes, if more than one tensor travels between two stages.

    Raises:
        UnsupportedError: so it is.
    """
    if max(len(received), len(sent)) > 1:
        _refuse(
            [
                (
                    f"adjust_tensor_shapes_fn asks for {max(len(received), len(sent))} tensors between two stages",
                    "send one, for example by concatenating them",
                )
            ]
        )
