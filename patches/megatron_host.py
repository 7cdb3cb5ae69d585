"""What Megatron-core brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from adaptra_plugin.host import Host, Spread
from adaptra_plugin.patches import megatron_arguments as arguments
from adaptra_plugin.support import Reason


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
    takes_arguments = True

    def judge(self, settings: Mapping[str, Any]) -> list[Reason]:
        from adaptra_plugin.patches.megatron_rules import reasons_of_config

        return reasons_of_config(SimpleNamespace(**arguments.fields(settings)), arguments.chunks(settings))

    def spread(self, settings: Mapping[str, Any]) -> Spread:
        return arguments.spread(settings)

    def read_arguments(self, words: Sequence[str]) -> dict[str, Any]:
        return arguments.read(words)
