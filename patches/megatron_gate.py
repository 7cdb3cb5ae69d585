"""The names of Megatron-core that are replaced while the plug-in is active.

`get_forward_backward_func` looks the schedules up as globals of its module when it is called, so replacing them works
however late, and also for callers that have imported the getter by name.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from adaptra_plugin import _activation, activate
from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.patches.registry import PATCHES, Patch

logger = logging.getLogger("adaptra")

HOST = HOSTS["megatron"]

_config: AdaptraConfig | None = None  # while the gate is open


def install() -> None:
    """Replaces the schedules (once), if the configuration is there and enabled.

    Raises:
        ConfigError: the configuration is wrong; one line per mistake.
        UnsupportedError: megatron-core is of a version that is not supported, or lacks a name that is to be replaced.
    """
    global _config
    block = _activation.default_block()
    config = parse_config({} if block is None else block)
    if not config.enabled:
        close()
        return
    for patch in _patches():
        try:
            PATCHES.apply(patch)
        except BaseException:
            close()
            raise
    _config = config


def close() -> None:
    """Puts the stock functions back. References to a replacement that somebody has kept do what the stock function does."""
    global _config
    _config = None
    if (adapter := sys.modules.get("adaptra_plugin.patches.megatron")) is not None:
        adapter.forget()
    for patch in _patches():
        PATCHES.restore(patch.id)


def is_open() -> bool:
    return _config is not None


def _patches() -> list[Patch]:
    def schedule(name: str) -> Patch:
        return Patch(
            id=f"megatron.{name}",
            target=f"{HOST.entry}:forward_backward_pipelining_{name}_interleaving",
            host=HOST.distribution,
            module=HOST.version_from,
            versions=HOST.versions,
            reason="runs slack-adaptive plans and moves activations and gradients through the proxy",
            replace=_wrap,
            sweep=True,
        )

    return [schedule("without"), schedule("with")]


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward_backward(**arguments: Any) -> Any:
        if _config is None:
            return stock(**arguments)
        from adaptra_plugin.patches import megatron as adapter

        return adapter.run(stock, _config, arguments)

    return forward_backward


class _Activate(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if values:
            activate(str(values))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """For `extra_args_provider` of Megatron-LM's `pretrain`: adds `--adaptra-config FILE`, which activates the plug-in."""
    group = parser.add_argument_group("adaptra")
    group.add_argument(
        "--adaptra-config",
        action=_Activate,
        default=None,
        metavar="FILE",
        help='JSON file with the "adaptra" block; without it the stock schedules run',
    )
    return parser
