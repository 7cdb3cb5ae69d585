"""Jobs with mixture of experts and multi-token prediction, of Megatron-core's own layers."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from adaptra_plugin.launch.megatron_gpt import GptJob

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "allgather",
    "add_bias_linear": False,
}
"""Fields of Megatron's `TransformerConfig`."""


def expert_layers(config: Any) -> Any:
    """Layers with experts that run one after the other (`SequentialMLP`)."""
    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)


def experts(extra: dict[str, Any] | None = None, **job: Any) -> GptJob:
    """A job with experts; `extra`: more fields of Megatron's `TransformerConfig`."""
    return GptJob(**{"spec": expert_layers, **job}, extra={**EXPERTS, **(extra or {})})
