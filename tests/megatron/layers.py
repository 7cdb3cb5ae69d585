"""Parts that Megatron-core takes from Transformer Engine or apex where its own do not do: a norm for sequence parallelism, an
attention for context parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn


class SpreadNorm(nn.LayerNorm):
    """Of a sequence that is spread over the tensor-parallel ranks: gradients of its parameters are summed over them."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class _Gather(torch.autograd.Function):
    """The whole sequence, dimension 0, from the context-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        whole = whole.contiguous()
        torch.distributed.all_reduce(whole, group=group)
        return whole.chunk(group.size())[group.rank()]


class GatheredAttention(nn.Module):
    """Each context-parallel rank attends from its own part of the sequence to all of it."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, _Gather.apply(key), _Gather.apply(value)))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.permute(2, 0, 1, 3).flatten(2).contiguous()


def spread_spec(config: Any) -> TransformerBlockSubmodules:
    """Layers for sequence parallelism."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SpreadNorm
    return _block(config, layer)


def gathered_spec(config: Any) -> TransformerBlockSubmodules:
    """Layers for context parallelism."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    return _block(config, layer)


def _block(config: Any, layer: Any) -> TransformerBlockSubmodules:
    count = config.num_layers // config.pipeline_model_parallel_size
    count //= config.virtual_pipeline_model_parallel_size or 1
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=SpreadNorm)
