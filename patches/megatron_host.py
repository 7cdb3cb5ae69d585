"""What Megatron-core brings."""

from __future__ import annotations

from adaptra_plugin.host import Host


class Megatron(Host):
    name = "megatron"
    title = "Megatron"
    distribution = "megatron-core"
    versions = ">=0.14,<0.20"
    version_from = "megatron.core"
    entry = "megatron.core.pipeline_parallel.schedules"
    gate = "adaptra_plugin.patches.megatron_gate"
    on_request = True
    packages = ("megatron", "transformer_engine")
    wandb_rank = -1
