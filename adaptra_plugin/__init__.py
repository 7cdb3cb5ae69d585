"""Slack-adaptive pipeline schedules and delegated p2p for DeepSpeed and Megatron-core.

    import adaptra_plugin
    adaptra_plugin.activate("adaptra.json")    # Megatron; DeepSpeed needs no line: its configuration has the block
    adaptra_plugin.status()        # what is patched, which plan runs
    adaptra_plugin.deactivate()    # every name of every module is the stock one again

Nothing heavy is imported here: torch calls `adaptra_plugin._autoload` at the end of `import torch`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "activate", "deactivate", "status"]


def activate(config: str | Path | Mapping[str, Any] | None = None) -> None:
    """Opens the gates: engines that DeepSpeed builds from now on follow the `"adaptra"` block of their configuration, and
    Megatron's pipelined schedules are Adaptra's.

    Args:
        config: a JSON file, or a mapping, with the block's content (with or without the key `"adaptra"` around it), for
            hosts whose own configuration has no such block; a block in the host's configuration wins. None: the file that the
            environment variable `ADAPTRA_CONFIG` names; without one, Megatron runs with all defaults.

    Raises:
        ConfigError: `config` is wrong; one line per mistake.
        UnsupportedError: the installed host is of a version that Adaptra does not know.
    """
    from adaptra_plugin import _activation, _autoload
    from adaptra_plugin.config import parse_config

    block = None
    if config is not None:
        block = _activation.read_block(config)
        parse_config(block)
    _activation.ask(block)
    _autoload.install()


def deactivate() -> None:
    """Ends all sessions and restores every name that was patched. Engines that exist go on with stock schedules."""
    from adaptra_plugin import _activation, _autoload

    _activation.end()
    _autoload.uninstall()
    if (registry := sys.modules.get("adaptra_plugin.patches.registry")) is not None:
        registry.PATCHES.restore()


def status() -> dict[str, Any]:
    """What is active.

    `hosts`: name, installed and supported versions, whether the gate is open. `patches`: applied, bound per call, or skipped, each
    with the reason. `sessions`: one entry per running session.
    """
    from adaptra_plugin import _activation
    from adaptra_plugin.patches.hosts import HOSTS

    registry = sys.modules.get("adaptra_plugin.patches.registry")
    sessions = _activation.sessions()
    return {
        "active": bool(sessions),
        "hosts": [host.status() for host in HOSTS.values()],
        "patches": registry.PATCHES.describe() if registry is not None else [],
        "sessions": sessions,
    }
