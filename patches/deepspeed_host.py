"""What DeepSpeed brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptra_plugin.host import Host, Spread
from adaptra_plugin.support import Reason


class DeepSpeed(Host):
    name = distribution = entry = "deepspeed"
    title = "DeepSpeed"
    versions = ">=0.16,<0.20"
    gate = "adaptra_plugin.patches.deepspeed_gate"
    packages = ("deepspeed",)
    collectives = "deepspeed/comm/"
    has_configuration = True

    def judge(self, settings: Mapping[str, Any]) -> list[Reason]:
        from adaptra_plugin.patches.deepspeed_support import reasons_of_config

        return reasons_of_config(settings)

    def spread(self, settings: Mapping[str, Any]) -> Spread:
        microbatches = settings.get("gradient_accumulation_steps")
        return Spread(microbatches=microbatches if isinstance(microbatches, int) and microbatches > 0 else None)
