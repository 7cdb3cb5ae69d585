"""The gate: the one name that is wrapped when DeepSpeed is imported.

`deepspeed.initialize` first comes here. If the configuration has the `"adaptra"` block and it is enabled, the engine class
is another one while the stock function runs, and only then. If not, the stock function is put back before it runs: nothing
of DeepSpeed is different then. In a process that has built an engine with the block the gate stays, so each call chooses.
"""

from __future__ import annotations

import base64
import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptra_plugin.patches.deepspeed_support import effective_config
from adaptra_plugin.patches.registry import PATCHES, Patch

GATE_ID = "deepspeed.initialize"
logger = logging.getLogger("adaptra")

_open = False  # between `install` and `close`, even if the gate has stepped aside: for references to the wrapper
_used = False  # an engine with the block has been built since `install`


def install() -> None:
    """Wraps `deepspeed.initialize` (once).

    Raises:
        UnsupportedError: DeepSpeed is older than anything Adaptra knows.
    """
    global _open
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
    _open = True


def close() -> None:
    """Puts the stock function back. A reference to the wrapper that somebody has kept does what the stock function does."""
    global _open, _used
    _open = _used = False
    PATCHES.restore(GATE_ID)


def is_open() -> bool:
    return PATCHES.is_applied(GATE_ID)


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        global _used
        host_config = _host_config(stock, args, kwargs) if _open else None
        if host_config is None:
            return stock(*args, **kwargs)
        config = effective_config(host_config)
        if not config.enabled:
            if not _used:
                _step_aside()
            return stock(*args, **kwargs)
        from adaptra_plugin.patches import deepspeed as adapter

        model = inspect.signature(stock).bind_partial(*args, **kwargs).arguments.get("model")
        with PATCHES.during(adapter.engine_patch(model, host_config)):
            built = stock(*args, **kwargs)
        _used = True
        return built

    return initialize


def _step_aside() -> None:
    """With the block absent or disabled every name of the host has to be the stock one."""
    if not PATCHES.is_applied(GATE_ID):
        return
    why = 'the configuration has no enabled "adaptra" block'
    PATCHES.restore(GATE_ID, why=why)
    logger.info(
        "stepped aside: %s; for a later engine of this process that has one, call adaptra_plugin.activate() first", why
    )


def _host_config(stock: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration as `initialize` will find it. None where DeepSpeed cannot use it either: it says why."""
    try:
        arguments = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
        source = arguments.get("config")
        if source is None:
            source = arguments.get("config_params")
        for name in ("deepscale_config", "deepspeed_config"):
            named = getattr(arguments.get("args"), name, None)
            if named is not None:
                if source is not None:
                    return None  # DeepSpeed takes one only
                source = named
        config = _parse(source)
    except Exception:  # noqa: BLE001 - whatever is wrong here, DeepSpeed's own words are the ones its users know
        return None
    return config if isinstance(config, dict) else None


def _parse(source: Any) -> Any:
    """A dictionary, a file, or base64, of which the last two hold Hjson: what `DeepSpeedConfig` accepts, in its order."""
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    if isinstance(source, dict):
        return source
    # not Path.exists: a long base64 string is no file name, about which pathlib raises an error
    if not os.path.exists(source):  # noqa: PTH110
        return hjson.loads(base64.urlsafe_b64decode(source).decode("utf-8"))
    if not Path(source).is_file():
        logger.warning("%s is no regular file and can be read only once: not looked at for an adaptra block", source)
        return None
    with Path(source).open() as file:
        return hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
