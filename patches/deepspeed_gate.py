"""The gate: the one name that is wrapped when DeepSpeed is imported.

`deepspeed.initialize` first comes here. If the configuration has the `"adaptra"` block and it is enabled, the engine is
patched and the call goes on. If not, the stock function is put back before it runs: nothing of DeepSpeed is different then.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptra_plugin import _activation
from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.errors import ConfigError
from adaptra_plugin.patches.registry import PATCHES, Patch

GATE_ID = "deepspeed.initialize"


def install() -> None:
    """Wraps `deepspeed.initialize` (once)."""
    PATCHES.apply(
        Patch(
            id=GATE_ID,
            target="deepspeed:initialize",
            host="deepspeed",
            versions=">=0.14",
            reason='reads the "adaptra" block before the engine is built',
            replace=_wrap,
            sweep=True,
        )
    )


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind_partial(*args, **kwargs).arguments
        host_config = _host_config(arguments)
        config = effective_config(host_config)
        if not config.enabled:
            PATCHES.restore(GATE_ID)
            return stock(*args, **kwargs)
        from adaptra_plugin.patches import deepspeed as adapter

        adapter.install(arguments.get("model"), host_config, config)
        return stock(*args, **kwargs)

    return initialize


def effective_config(host_config: Mapping[str, Any]) -> AdaptraConfig:
    """The `"adaptra"` block of DeepSpeed's configuration, or the one given to `activate`.

    Raises:
        ConfigError: one line per mistake.
    """
    return parse_config(host_config["adaptra"] if "adaptra" in host_config else _activation.default_block())


def _host_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration as `initialize` would find it; empty where only DeepSpeed itself can say what is wrong."""
    source = arguments.get("config") or arguments.get("config_params")
    if source is None:
        args = arguments.get("args")
        source = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, str | Path) and Path(source).is_file():
        try:
            data = json.loads(Path(source).read_text())
        except ValueError as error:
            raise ConfigError(f"{source} is not JSON: {error}") from None
        return data if isinstance(data, dict) else {}
    return {}
