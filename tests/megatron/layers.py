"""Parts that Megatron-core takes from Transformer Engine or apex: a norm for sequence parallelism, an attention for context
parallelism, linear layers (see `te_stand_in`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from tests.megatron import te_stand_in as te


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


class TeLinear(te.Linear):
    """What Megatron makes of a linear layer of Transformer Engine."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool = True,
        skip_bias_add: bool = False,
        norm: bool = False,
        fuse: bool = False,
        quantised: bool = False,
        **more: Any,
    ) -> None:
        self.config = config
        super().__init__(
            input_size,
            output_size,
            bias=bias,
            norm=norm,
            return_bias=bias and skip_bias_add,
            params_dtype=config.params_dtype,
            init_method=init_method,
            fuse_wgrad_accumulation=fuse,
            delay_wgrad_compute=config.delay_wgrad_compute,
            quantised=quantised,
        )
        self.is_first_microbatch = True

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x, is_first_microbatch=self.is_first_microbatch)
        self.is_first_microbatch = False
        return y if self.return_bias else (y, None)

    def backward_dw(self) -> None:
        if self.config.delay_wgrad_compute:
            super().backward_dw()


class TeMlp(nn.Module):
    """Layers of Transformer Engine that Megatron's dense models do not use, one that is called twice, and a frozen one."""

    def __init__(self, config: Any, fuse: bool = False, **more: Any) -> None:
        super().__init__()
        width = config.hidden_size
        common = {
            "params_dtype": config.params_dtype,
            "init_method": config.init_method,
            "fuse_wgrad_accumulation": fuse,
            "delay_wgrad_compute": config.delay_wgrad_compute,
        }
        self.mlp = te.LayerNormMLP(width, 2 * width, **common)
        self.grouped = te.GroupedLinear(2, width, width, **common)
        self.twice = te.Linear(width, width, **common)
        self.frozen = te.Linear(width, width, bias=False, **common)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor, **more: Any) -> tuple[Tensor, None]:
        y = self.mlp(x).flatten(0, -2)
        y = self.grouped(y, [len(y) // 4, len(y) - len(y) // 4]).view_as(x)
        y = x + self.twice(F.gelu(self.twice(y)))
        return self.frozen(y), None


def _begin(model: nn.Module) -> None:
    for layer in model.modules():
        if hasattr(layer, "is_first_microbatch"):
            layer.is_first_microbatch = True


def te_spec(config: Any, mixed: bool = False, quantised: bool = False, fuse: bool = False) -> Any:
    """Layers whose linear layers are all of Transformer Engine. `mixed`: with a `TeMlp`; `fuse`: they add to `main_grad`;
    `quantised`: as with fp8, each iteration's first microbatch is told to overwrite it."""
    layer = get_gpt_layer_local_spec()
    if quantised:
        MegatronModule.set_is_first_microbatch = _begin
    plain = ModuleSpec(module=TeLinear, params={"fuse": fuse, "quantised": quantised})
    normed = ModuleSpec(module=TeLinear, params={"fuse": fuse, "quantised": quantised, "norm": True})
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = normed, plain
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if mixed:
        layer.submodules.mlp = ModuleSpec(module=TeMlp, params={"fuse": fuse})
    else:
        parts = layer.submodules.mlp.submodules
        parts.linear_fc1, parts.linear_fc2 = normed, plain
    return layer


def delayed_te_spec(config: Any, **more: Any) -> Any:
    """... with weight gradients that are delayed."""
    config.delay_wgrad_compute = True  # Megatron's own check, which is over, ties it to mixture of experts
    return te_spec(config, **more)


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


def marked(config):
    """Layers like any others, of a job that says that it counts on the stock order."""
    config.moe_paged_stash = True
    return get_gpt_layer_local_spec()
