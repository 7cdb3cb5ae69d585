"""Parts that Megatron-core takes from Transformer Engine or apex where its own do not do: a norm for sequence parallelism, an
attention for context parallelism."""

from __future__ import annotations

import queue
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


class _Delayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: DelayedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.layer.need_backward_dw():
            ctx.layer.wgrad_store.context.put((x, grad))
            return grad @ weight, None, None
        return grad @ weight, ctx.layer.gradient(x, grad), None


class _Store:
    def __init__(self, delays: bool) -> None:
        self.context: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue()
        self._delays = delays

    def delay_wgrad_compute(self) -> bool:
        return self._delays


class DelayedLinear(nn.Module):
    """What Megatron sees of a linear layer of Transformer Engine: with `delay_wgrad_compute` its backward keeps what the weight
    gradient needs, and `backward_dw` takes the oldest, assigns the gradient and runs the hooks of the data-parallel wrapper."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, **more: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.wgrad_store = _Store(config.delay_wgrad_compute)
        self._hooks: list[Any] = []
        if self.need_backward_dw():
            self.weight.skip_backward_post_hook = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _Delayed.apply(x, self.weight, self), self.bias

    @staticmethod
    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.delay_wgrad_compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Any) -> None:
        self._hooks.append(hook)

    def backward_dw(self) -> None:
        if self.need_backward_dw():
            gradient = self.gradient(*self.wgrad_store.context.get_nowait())
            if self.weight.grad is None:
                self.weight.grad = gradient
            for hook in self._hooks:
                hook()


def te_spec(config: Any) -> Any:
    """Layers whose MLP is of Transformer Engine."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.mlp.submodules.linear_fc1 = layer.submodules.mlp.submodules.linear_fc2 = DelayedLinear
    return layer


def delayed_te_spec(config: Any) -> Any:
    """... with weight gradients that are delayed."""
    config.delay_wgrad_compute = True  # Megatron's own check, which is over, ties it to mixture of experts
    return te_spec(config)


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


class Kernels:
    """What apex's extension does for `gradient_accumulation_fusion`, without a GPU."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x, grad_y, main_grad):
        main_grad += grad_y.t().float() @ x.float()

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
