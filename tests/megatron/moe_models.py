"""Jobs with mixture of experts and multi-token prediction, of Megatron-core's own layers."""

from __future__ import annotations

import contextlib
from typing import Any

from megatron.core.models import backends
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import layers as linears
from megatron.core.tensor_parallel import random
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe.router import TopKRouter

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.megatron.layers import Kernels, SpreadNorm

_ROUTER: Any = TopKRouter
if _COUNT := getattr(getattr(_ROUTER, "_apply_expert_bias", None), "_torchdynamo_orig_callable", None):
    _ROUTER._apply_expert_bias = _COUNT  # each rank would compile it, for seconds

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "allgather",
    "add_bias_linear": False,
}
"""Fields of Megatron's `TransformerConfig`."""


def layers(config: Any) -> Any:
    """Local layers, with experts that run one after the other (`SequentialMLP`) if there are experts."""
    if config.sequence_parallel:  # the local norm is none for it
        vars(backends)["LNImpl"] = vars(transformer_block)["LayerNormImpl"] = SpreadNorm
    if config.recompute_modules and "layernorm" in config.recompute_modules:
        vars(random).update(FP8GlobalStateManager=_NoFp8, activation_recompute_forward=_nothing, fp8_autocast=_nothing)
    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)


def fused_layers(config: Any) -> Any:
    """... whose weight gradients are accumulated by one kernel (`gradient_accumulation_fusion`)."""
    vars(linears).update(_grad_accum_fusion_available=True, fused_weight_gradient_mlp_cuda=Kernels)
    return layers(config)


class _NoFp8:
    """Checkpoints that discard their output ask Transformer Engine whether it runs in fp8, installed or not."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _nothing(**_: Any) -> Any:
    return contextlib.nullcontext()


def experts(extra: dict[str, Any] | None = None, **job: Any) -> GptJob:
    """A job with experts; `extra`: more fields of Megatron's `TransformerConfig`."""
    more = {"sequence_parallel": True} if job.get("tensor", 1) > 1 else {}
    return GptJob(**{"spec": layers, **job}, extra={**EXPERTS, **more, **(extra or {})})


def predicting(depth: int = 1, extra: dict[str, Any] | None = None, **job: Any) -> GptJob:
    """A job that predicts `depth` more tokens."""
    more = {"sequence_parallel": True} if job.get("tensor", 1) > 1 else {}
    return GptJob(
        **{"spec": layers, **job},
        extra={"mtp_num_layers": depth, "mtp_loss_scaling_factor": 0.1, **more, **(extra or {})},
    )
