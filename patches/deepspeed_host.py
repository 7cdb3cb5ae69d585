"""What DeepSpeed brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptra_plugin.host import Host


class DeepSpeed(Host):
    name = distribution = entry = "deepspeed"
    title = "DeepSpeed"
    versions = ">=0.16,<0.20"
    gate = "adaptra_plugin.patches.deepspeed_gate"
    packages = ("deepspeed",)
    collectives = "deepspeed/comm/"
    has_configuration = True

    def check_configuration(self, settings: Mapping[str, Any]) -> None:
        from adaptra_plugin.patches.deepspeed_support import check_config

        check_config(settings)
