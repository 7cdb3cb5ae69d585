"""A short training with one version of a host, stock and with Adaptra, to the bit the same: `smoke HOST VERSION`."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

from tests.compat.hosts import pretend_triton

CURRICULUM = {
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 40, "difficulty_step": 8},
    }
}
"""Of sequence lengths: older versions pass them to `forward`, but not in a pipeline."""


def deepspeed() -> None:
    from tests.forked import import_deepspeed, run_ranks

    import_deepspeed()
    run_ranks(_deepspeed_rank, 2)


def _deepspeed_rank(rank: int) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from tests.patches.models import assert_same, train

    slow: dict[str, Any] = {"simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 10, "from_iteration": 1}]}}
    bf16 = {"bf16": {"enabled": True}}
    configs: tuple[dict[str, Any], ...] = (
        {},
        {**bf16, "zero_optimization": {"stage": 1}},
        bf16,  # BF16_Optimizer; older versions update immediately if nothing else is said
        {"bf16": {"enabled": True, "immediate_grad_update": True}},
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        *([CURRICULUM] if hasattr(DeepSpeedEngine, "curriculum_enabled_legacy") else []),
    )
    for config in configs:
        stock = train(config, None, [4, 4, 4], stages=2, evaluate_after=(1,))
        assert_same(stock, train(config, slow, [4, 4, 4], stages=2, evaluate_after=(1,)))


def megatron_core() -> None:
    pretend_triton()
    from adaptra_plugin.launch.megatron_gpt import GptJob
    from tests.megatron.layers import marked
    from tests.megatron.moe_models import experts, predicting
    from tests.megatron.runs import SLOW, assert_same, both, loaded

    loaded()
    sharded = GptJob(dtype="bf16", overlap_grad_reduce=True, distributed_optimizer=True, overlap_param_gather=True)
    per_token = {"calculate_per_token_loss": True}
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
    jobs = (
        (GptJob(), 2),
        (GptJob(chunks=2, tensor=2, extra=per_token), 4),
        (sharded, 4),
        (experts(balanced, expert=2, chunks=2), 4),
        (predicting(1), 2),
        (GptJob(chunks=2, spec=marked), 2),  # its own schedule, followed
    )
    for job, world in jobs:
        assert_same(*both(job, world, SLOW, steps=(4, 4, 4), evaluate_after=(1,)))


def main() -> None:
    host, version = sys.argv[1:]
    assert metadata.version(host) == version, f"{host} {metadata.version(host)} is in front of {version}"
    {"deepspeed": deepspeed, "megatron-core": megatron_core}[host]()
    print(f"{host} {version}: the same to the bit")


if __name__ == "__main__":
    main()
